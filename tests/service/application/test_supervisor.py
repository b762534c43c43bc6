"""The supervisor, over the real store, with workers that live and die at the test's word."""

import pytest

from ferryman_service.application.supervisor import Supervisor, SupervisorConfig
from ferryman_service.domain.errors import AttemptFenced
from ferryman_service.domain.records import RunState
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


def test_a_worker_that_dies_fails_its_run_with_its_last_words(runs, launcher, queue_run, worker):
    run = queue_run()
    supervisor = make_supervisor(runs, launcher)
    supervisor.tick()
    runs.claim_attempt(run.run_id, 1, worker)
    launcher.alive.clear()
    launcher.how = "killed by signal 9"
    supervisor.tick()
    run = runs.get(run.run_id)
    assert run.state is RunState.FAILED
    assert run.failure.reason is FailureReason.WORKER_DIED
    assert "killed by signal 9" in run.failure.message
    assert run.failure.log_tail == "last words of attempt 1"


def test_a_worker_that_dies_before_it_claims_fails_its_run(runs, launcher, queue_run):
    run = queue_run()
    supervisor = make_supervisor(runs, launcher)
    supervisor.tick()
    launcher.alive.clear()
    supervisor.tick()
    assert runs.get(run.run_id).state is RunState.FAILED
    assert len(launcher.started) == 1


def test_a_program_that_cannot_be_started_fails_the_run(runs, launcher, queue_run):
    run = queue_run()
    launcher.fail_with = FileNotFoundError("no such program")
    make_supervisor(runs, launcher).tick()
    assert "no such program" in runs.get(run.run_id).failure.message


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
    assert runs.get(run.run_id).state is RunState.FAILED
