"""The supervisor, over the real store, with workers that live and die at the test's word."""

import time

import pytest

from ferryman_service.application.supervisor import Supervisor, SupervisorConfig
from ferryman_service.domain.errors import AttemptFenced
from ferryman_service.domain.records import RunEvent, RunState, StepMetrics
from ferryman_service.domain.runs import FailureReason
from tests.fakes.launcher import FakeLauncher


@pytest.fixture
def launcher():
    return FakeLauncher()


def make_supervisor(runs, launcher, **config):
    return Supervisor(runs, launcher, SupervisorConfig(**config))


def test_a_queued_run_gets_its_first_attempt(runs, launcher, queue_run):
    run = queue_run()
    make_supervisor(runs, launcher).tick()
    assert launcher.started == [(run.run_id, 1)]
    assert runs.get(run.run_id).state is RunState.STARTING


def test_runs_wait_for_a_free_place_in_order(runs, launcher, queue_run, worker):
    first, second = queue_run(), queue_run()
    supervisor = make_supervisor(runs, launcher, max_concurrent_runs=1)
    supervisor.tick()
    supervisor.tick()
    assert launcher.started == [(first.run_id, 1)]
    runs.claim_attempt(first.run_id, 1, worker)
    runs.change_state(first.run_id, 1, RunState.CANCELLED)
    supervisor.tick()
    assert launcher.started == [(first.run_id, 1), (second.run_id, 1)]


def die(runs, launcher, supervisor, run, worker, attempt):
    """Let an attempt start, claim and die."""
    supervisor.tick()
    assert launcher.started[-1] == (run.run_id, attempt)
    runs.claim_attempt(run.run_id, attempt, worker)
    launcher.alive.clear()
    launcher.how = "killed by signal 9"
    supervisor.tick()


def test_a_worker_that_dies_is_followed_by_another_after_a_pause(runs, launcher, queue_run, worker):
    run = queue_run()
    supervisor = make_supervisor(runs, launcher, backoff_s=1000.0, max_backoff_s=3000.0)
    die(runs, launcher, supervisor, run, worker, 1)
    run = runs.get(run.run_id)
    assert (run.state, run.restarts, run.worker) == (RunState.QUEUED, 1, None)
    assert 990 < run.not_before_ns / 1e9 - time.time() <= 1000
    remarks = [record.payload for record in runs.records_after(run.run_id, 0, 100)]
    (remark,) = [payload for payload in remarks if isinstance(payload, RunEvent)]
    assert remark.code == "RESTARTED"
    assert "killed by signal 9" in remark.message
    supervisor.tick()
    assert len(launcher.started) == 1  # its time has not come
    with pytest.raises(AttemptFenced):
        runs.append(run.run_id, 1, [], None)  # the dead worker, should it live after all


def test_too_many_deaths_in_a_row_fail_the_run_with_its_last_words(runs, launcher, queue_run, worker):
    run = queue_run()
    supervisor = make_supervisor(runs, launcher, backoff_s=0.0, max_restarts=2)
    for attempt in (1, 2, 3):
        die(runs, launcher, supervisor, run, worker, attempt)
    run = runs.get(run.run_id)
    assert run.state is RunState.FAILED
    assert run.failure.reason is FailureReason.WORKER_DIED
    assert "killed by signal 9" in run.failure.message
    assert "3 workers in a row" in run.failure.message
    assert run.failure.log_tail == "last words of attempt 3"


def test_a_worker_that_gets_further_is_forgiven_the_deaths_before(runs, launcher, queue_run, worker):
    run = queue_run()
    supervisor = make_supervisor(runs, launcher, backoff_s=0.0, max_restarts=1)
    values = dict.fromkeys(StepMetrics.__dataclass_fields__, 1)
    for attempt in range(1, 5):
        supervisor.tick()
        runs.claim_attempt(run.run_id, attempt, worker)
        runs.append(run.run_id, attempt, [StepMetrics(**values | {"step": attempt})], None)
        assert runs.get(run.run_id).restarts == 0
        launcher.alive.clear()
        supervisor.tick()
        assert runs.get(run.run_id).state is RunState.QUEUED


def test_a_worker_that_dies_before_it_claims_is_followed_by_another(runs, launcher, queue_run):
    run = queue_run()
    supervisor = make_supervisor(runs, launcher, backoff_s=0.0)
    supervisor.tick()
    launcher.alive.clear()
    supervisor.tick()
    supervisor.tick()
    assert launcher.started == [(run.run_id, 1), (run.run_id, 2)]


def test_a_program_that_cannot_be_started_is_tried_again_and_fails_in_the_end(runs, launcher, queue_run):
    run = queue_run()
    launcher.fail_with = FileNotFoundError("no such program")
    supervisor = make_supervisor(runs, launcher, backoff_s=0.0, max_restarts=1)
    supervisor.tick()
    assert runs.get(run.run_id).state is RunState.QUEUED
    supervisor.tick()
    assert "no such program" in runs.get(run.run_id).failure.message


def test_a_paused_run_holds_no_place_and_no_worker(runs, launcher, queue_run):
    resting, other = queue_run(), queue_run()
    runs.request_pause(resting.run_id)
    supervisor = make_supervisor(runs, launcher, max_concurrent_runs=1)
    supervisor.tick()
    assert launcher.started == [(other.run_id, 1)]
    assert runs.get(resting.run_id).state is RunState.PAUSED


def test_a_worker_that_dies_after_a_pause_leaves_the_run_paused(runs, launcher, running_run):
    run = running_run()
    runs.request_pause(run.run_id)
    make_supervisor(runs, launcher).tick()
    assert runs.get(run.run_id).state is RunState.PAUSED


def test_a_new_supervisor_adopts_a_worker_that_lives(runs, launcher, queue_run, worker):
    run = queue_run()
    make_supervisor(runs, launcher).tick()
    runs.claim_attempt(run.run_id, 1, worker)
    make_supervisor(runs, launcher).tick()
    assert launcher.started == [(run.run_id, 1)]
    assert runs.get(run.run_id).state is RunState.RUNNING


def test_an_attempt_that_nobody_claimed_is_made_anew_and_the_old_one_is_fenced(runs, launcher, queue_run, worker):
    run = queue_run()
    runs.begin_attempt(run.run_id, 0)  # and then the service died
    make_supervisor(runs, launcher).tick()
    assert launcher.started == [(run.run_id, 2)]
    with pytest.raises(AttemptFenced):
        runs.claim_attempt(run.run_id, 1, worker)
    assert runs.claim_attempt(run.run_id, 2, worker).state is RunState.RUNNING


def test_a_run_that_ended_by_itself_is_left_alone(runs, launcher, running_run):
    run = running_run()
    runs.change_state(run.run_id, 1, RunState.CANCELLED)
    make_supervisor(runs, launcher).tick()
    assert runs.get(run.run_id).state is RunState.CANCELLED


def test_a_worker_that_dies_after_a_cancellation_leaves_the_run_cancelled(runs, launcher, running_run):
    run = running_run()
    runs.request_cancel(run.run_id)
    make_supervisor(runs, launcher).tick()
    assert runs.get(run.run_id).state is RunState.CANCELLED


def test_a_worker_that_does_not_listen_is_killed_after_the_grace(runs, launcher, running_run):
    run = running_run()
    launcher.alive.add((run.run_id, 1))
    runs.request_cancel(run.run_id)
    supervisor = make_supervisor(runs, launcher, cancel_grace_s=-1)
    supervisor.tick()
    assert launcher.killed == [(run.run_id, 1)]
    assert runs.get(run.run_id).state is RunState.CANCELLED


def test_a_worker_within_its_grace_is_not_killed(runs, launcher, running_run):
    run = running_run()
    launcher.alive.add((run.run_id, 1))
    runs.request_cancel(run.run_id)
    make_supervisor(runs, launcher, cancel_grace_s=60).tick()
    assert launcher.killed == []
    assert runs.get(run.run_id).state is RunState.RUNNING


def test_a_start_that_takes_too_long_is_ended(runs, launcher, queue_run):
    run = queue_run()
    supervisor = make_supervisor(runs, launcher, start_timeout_s=-1)
    supervisor.tick()
    supervisor.tick()
    assert launcher.killed == [(run.run_id, 1)]
    assert runs.get(run.run_id).state is RunState.QUEUED
