"""The supervisor, over the real store, with workers that live and die at the test's word."""

import asyncio
import errno
import time

import pytest
from sqlalchemy import text

from ferryman_service.application.supervisor import FolderNotHeld, Silence, Supervisor, SupervisorConfig
from ferryman_service.domain.errors import AttemptFenced
from ferryman_service.domain.log_context import log_fields
from ferryman_service.domain.records import EventLevel, RunEvent, RunState, StepMetrics
from ferryman_service.domain.runs import FailureReason, Handover
from ferryman_service.domain.threads import Threads
from ferryman_service.stores.database import writing
from tests.fakes.launcher import FakeLauncher
from tests.fakes.observers import FakeLaunchObserver


@pytest.fixture
def launcher():
    return FakeLauncher()


def make_supervisor(runs, launcher, **config):
    return Supervisor(runs, launcher, SupervisorConfig(**config), Threads(1, "supervisor"))


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
    assert launcher.started == [(first.run_id, 1)], "the worker of the first has not gone yet, nor has its memory"
    launcher.alive.clear()
    supervisor.tick()
    assert launcher.started == [(first.run_id, 1), (second.run_id, 1)]


def test_below_the_mark_of_the_disk_no_run_begins_and_those_that_have_begun_go_on(runs, launcher, queue_run, worker):
    space, config = [True], SupervisorConfig(max_concurrent_runs=2, backoff_s=0.0)
    supervisor = Supervisor(runs, launcher, config, Threads(1, "supervisor"), has_space=lambda: space[0])
    begun = queue_run()
    supervisor.tick()
    fresh, space[0] = queue_run(), False
    die(runs, launcher, supervisor, begun, worker, 1)
    supervisor.tick()
    assert launcher.started == [(begun.run_id, 1), (begun.run_id, 2)]
    space[0] = True
    supervisor.tick()
    assert launcher.started[2:] == [(fresh.run_id, 1)]


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
    assert "in 1000 s" in remark.message
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


@pytest.mark.parametrize(("ask", "state"), [("request_pause", RunState.PAUSED), ("request_cancel", RunState.CANCELLED)])
def test_callers_request_takes_precedence_over_restart_and_failure(runs, launcher, running_run, ask, state):
    run = running_run()
    getattr(runs, ask)(run.run_id)
    make_supervisor(runs, launcher, max_restarts=0).tick()
    assert runs.get(run.run_id).state is state


def test_no_restart_at_all_can_be_wanted(runs, launcher, running_run):
    run = running_run()
    make_supervisor(runs, launcher, max_restarts=0).tick()
    assert runs.get(run.run_id).failure.reason is FailureReason.WORKER_DIED


def test_no_attempt_starts_before_every_process_of_the_last_one_is_gone(runs, launcher, running_run):
    run = running_run()
    launcher.unkillable = True
    supervisor = make_supervisor(runs, launcher, backoff_s=0.0)
    supervisor.tick()
    supervisor.tick()
    assert runs.get(run.run_id).state is RunState.RUNNING, "nothing is said before it is true"
    launcher.unkillable = False
    supervisor.tick()
    supervisor.tick()
    assert launcher.started == [(run.run_id, 2)]


def test_remains_of_an_attempt_that_gave_up_are_ended_first(runs, launcher, running_run):
    run = running_run()
    runs.request_pause(run.run_id)
    runs.give_up_attempt(run.run_id, 1, Handover(state=RunState.QUEUED, message=""))
    runs.request_resume(run.run_id)
    launcher.alive.add((run.run_id, 1))  # on its way out, or it hangs
    launcher.unkillable = True
    supervisor = make_supervisor(runs, launcher)
    supervisor.tick()
    assert (launcher.killed, launcher.started) == ([(run.run_id, 1)], [])
    launcher.unkillable = False
    supervisor.tick()
    assert launcher.started == [(run.run_id, 2)]


def test_a_run_keeps_its_place_while_it_waits_for_its_next_worker(runs, launcher, queue_run, worker):
    older, run = queue_run(), queue_run()
    runs.request_pause(older.run_id)
    supervisor = make_supervisor(runs, launcher, backoff_s=50.0)
    die(runs, launcher, supervisor, run, worker, 1)
    newer = queue_run()
    runs.request_resume(older.run_id)
    supervisor.tick()
    assert launcher.started == [(run.run_id, 1)]
    make_supervisor(runs, launcher, max_concurrent_runs=2).tick()
    assert launcher.started[1:] == [(older.run_id, 1)], "a second place is free"
    runs.request_cancel(run.run_id)
    make_supervisor(runs, launcher, max_concurrent_runs=2).tick()
    assert launcher.started[2:] == [(newer.run_id, 1)]


def test_the_pause_before_a_restart_outlives_the_service(runs, launcher, queue_run, worker):
    run = queue_run()
    die(runs, launcher, make_supervisor(runs, launcher, backoff_s=50.0), run, worker, 1)
    make_supervisor(runs, launcher).tick()
    assert len(launcher.started) == 1


def test_a_clock_that_was_set_back_holds_up_nobody(runs, launcher, running_run):
    run = running_run()
    tomorrow_ns = time.time_ns() + 24 * 3600 * 10**9
    runs.give_up_attempt(run.run_id, 1, Handover(state=RunState.QUEUED, message="", not_before_ns=tomorrow_ns))
    make_supervisor(runs, launcher).tick()
    assert launcher.started == [(run.run_id, 2)]


def test_the_pauses_double_up_to_a_bound(runs, launcher, queue_run, worker):
    run = queue_run()
    pauses_s = []
    for attempt in range(1, 6):
        runs.begin_attempt(run.run_id, attempt - 1)
        runs.claim_attempt(run.run_id, attempt, worker)
        make_supervisor(runs, launcher, backoff_s=100.0, max_backoff_s=500.0).tick()
        pauses_s.append(runs.get(run.run_id).not_before_ns / 1e9 - time.time())
    assert pauses_s == pytest.approx([100, 200, 400, 500, 500], abs=5)


def test_a_worker_that_finds_no_room_for_its_log_leaves_the_run_paused(runs, launcher, queue_run):
    run = queue_run()
    launcher.fail_with = OSError(errno.ENOSPC, "No space left on device", "/data/runs/x")
    make_supervisor(runs, launcher).tick()
    assert runs.get(run.run_id).state is RunState.PAUSED
    event = runs.records_after(run.run_id, 0, 100)[-2].payload
    assert (event.code, event.level) == ("DISK_FULL", EventLevel.ERROR)
    assert "/data/runs/x" in event.message


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM])
def test_a_machine_without_files_or_memory_costs_a_run_no_restart(runs, launcher, queue_run, number):
    run = queue_run()
    launcher.fail_with = OSError(number, "not now")
    supervisor = make_supervisor(runs, launcher, max_restarts=1, backoff_s=0.0, max_backoff_s=0.0)
    for _ in range(3):
        supervisor.tick()
    waiting = runs.get(run.run_id)
    assert (waiting.state, waiting.restarts) == (RunState.QUEUED, 0)
    assert [
        record.payload.code for record in runs.records_after(run.run_id, 0, 100) if hasattr(record.payload, "code")
    ] == ["NOT_STARTED"] * 3
    launcher.fail_with = None
    supervisor.tick()
    assert launcher.started == [(run.run_id, 4)]


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


def test_a_worker_that_does_not_listen_is_killed_after_the_grace(runs, launcher, running_run):
    run = running_run()
    launcher.alive.add((run.run_id, 1))
    runs.request_cancel(run.run_id)
    supervisor = make_supervisor(runs, launcher, cancel_grace_s=-1)
    supervisor.tick()
    assert launcher.killed == [(run.run_id, 1)]
    assert launcher.workers_killed == [run.worker]
    assert runs.get(run.run_id).state is RunState.CANCELLED


def test_a_pause_has_a_grace_of_its_own(runs, launcher, running_run):
    run = running_run()
    launcher.alive.add((run.run_id, 1))
    runs.request_pause(run.run_id)
    patient = make_supervisor(runs, launcher, cancel_grace_s=-1, pause_grace_s=60)
    patient.tick()
    assert launcher.killed == []
    runs.request_cancel(run.run_id)
    make_supervisor(runs, launcher, cancel_grace_s=60, pause_grace_s=60).tick()
    assert launcher.killed == [], "the cancellation's time begins with the cancellation"
    make_supervisor(runs, launcher, pause_grace_s=-1).tick()
    assert launcher.killed == [(run.run_id, 1)]


def test_an_export_is_not_killed_for_a_pause(runs, launcher, running_run):
    run = running_run()
    launcher.alive.add((run.run_id, 1))
    runs.request_pause(run.run_id)
    runs.change_state(run.run_id, 1, RunState.EXPORTING)
    make_supervisor(runs, launcher, pause_grace_s=-1).tick()
    assert launcher.killed == []


@pytest.mark.parametrize("end", ["succeeded", "paused", "deleted"])
def test_a_worker_that_has_written_its_end_but_does_not_go_is_killed_after_a_grace(runs, launcher, running_run, end):
    run = running_run()
    launcher.alive.add((run.run_id, 1))
    if end == "paused":
        runs.give_up_attempt(run.run_id, 1, Handover(state=RunState.PAUSED, message=""))
    else:
        runs.change_state(run.run_id, 1, RunState.CANCELLED)
    if end == "deleted":
        runs.delete(run.run_id)
    make_supervisor(runs, launcher, exit_grace_s=60).tick()
    assert launcher.killed == []
    make_supervisor(runs, launcher, exit_grace_s=-1).tick()
    assert launcher.killed == [(run.run_id, 1)]


def test_a_silent_worker_is_killed_and_followed_by_another(runs, launcher, running_run):
    run = running_run()
    launcher.alive.add((run.run_id, 1))
    supervisor = make_supervisor(runs, launcher, silence_s=0, backoff_s=0)
    for _ in range(3):
        supervisor.tick()
    assert launcher.killed == []
    launcher.stopped = True
    supervisor.tick()
    supervisor.tick()
    assert launcher.killed == [(run.run_id, 1)]
    remarks = [record.payload for record in runs.records_after(run.run_id, 0, 100)]
    assert "gave no sign of life for 0 s" in next(each.message for each in remarks if isinstance(each, RunEvent))
    supervisor.tick()
    assert launcher.started == [(run.run_id, 2)]


def test_time_in_which_the_supervisor_itself_did_not_run_counts_little():
    """A suspended machine, or a frozen container, stops it together with the workers."""
    silence = Silence(beat=1, seen_at_s=0.0).at(1, 0.25).at(1, 3600.0)
    assert 10 <= silence.lasted_s < 11
    assert silence.at(2, 3600.25).lasted_s == 0


def test_remains_of_a_finished_run_hold_its_slot(runs, launcher, queue_run):
    run = queue_run()
    launcher.alive.add(("run_that_was_deleted", 3))
    supervisor = make_supervisor(runs, launcher, max_concurrent_runs=1)
    supervisor.tick()
    assert launcher.started == []
    make_supervisor(runs, launcher, max_concurrent_runs=2).tick()
    assert launcher.started == [(run.run_id, 1)]


def test_a_run_that_cannot_be_looked_after_does_not_starve_the_others(runs, launcher, running_run, queue_run, caplog):
    broken, dead, waiting = running_run(), running_run(), queue_run()
    launcher.broken.add(broken.run_id)
    supervisor = make_supervisor(runs, launcher, max_concurrent_runs=4, backoff_s=0.0)
    supervisor.tick()
    assert runs.get(dead.run_id).state is RunState.QUEUED
    assert launcher.started == [(waiting.run_id, 1)]
    supervisor.tick()
    assert launcher.started == [(waiting.run_id, 1), (dead.run_id, 2)]
    bugs = [record.getMessage() for record in caplog.records if record.exc_info]
    assert [broken.run_id in message for message in bugs] == [True], "told once"


def test_log_lines_of_supervision_carry_the_run(runs, launcher, running_run, caplog):
    broken = running_run()
    launcher.broken.add(broken.run_id)
    seen = []
    caplog.handler.addFilter(lambda record: seen.append(dict(log_fields())) or True)
    make_supervisor(runs, launcher).tick()
    assert seen == [{"run": broken.run_id}]
    assert log_fields() == {}


class DeletingStore:
    """A run store whose callers delete a run between the supervisor's look and its deed."""

    def __init__(self, runs):
        self.runs = runs

    def unfinished(self):
        found = self.runs.unfinished()
        self.runs.request_cancel(found[0].run_id)
        self.runs.delete(found[0].run_id)
        return found

    def __getattr__(self, name):
        return getattr(self.runs, name)


def test_a_run_that_is_deleted_meanwhile_does_not_starve_the_others(runs, launcher, queue_run):
    _, other = queue_run(), queue_run()
    make_supervisor(DeletingStore(runs), launcher, max_concurrent_runs=2).tick()
    assert launcher.started == [(other.run_id, 1)]


def hand_over(runs, launcher, supervisor, run, worker, attempt, step=None):
    """Let an attempt start, claim, report perhaps, and be told to end."""
    supervisor.tick()
    assert launcher.started[-1] == (run.run_id, attempt)
    runs.claim_attempt(run.run_id, attempt, worker)
    if step is not None:
        values = dict.fromkeys(StepMetrics.__dataclass_fields__, 1)
        runs.append(run.run_id, attempt, [StepMetrics(**values | {"step": step})], None)
    restarts = runs.get(run.run_id).restarts
    handover = Handover(state=RunState.QUEUED, message="told to end", restarts=restarts + 1, forgiven=True)
    runs.give_up_attempt(run.run_id, attempt, handover)
    launcher.alive.clear()


def test_too_many_handovers_without_getting_further_fail_the_run(runs, launcher, queue_run, worker):
    run = queue_run()
    supervisor = make_supervisor(runs, launcher, max_restarts=2)
    for attempt in (1, 2, 3):
        hand_over(runs, launcher, supervisor, run, worker, attempt)
    supervisor.tick()
    run = runs.get(run.run_id)
    assert (run.state, run.attempt, run.failure.reason) == (RunState.FAILED, 3, FailureReason.WORKER_DIED)
    assert "3 workers in a row" in run.failure.message
    assert run.failure.log_tail == "last words of attempt 3"


def test_an_operator_may_end_a_worker_that_gets_further_as_often_as_he_likes(runs, launcher, queue_run, worker):
    run = queue_run()
    supervisor = make_supervisor(runs, launcher, max_restarts=0)
    for attempt in range(1, 5):
        hand_over(runs, launcher, supervisor, run, worker, attempt, step=attempt)
        assert runs.get(run.run_id).restarts == 0
    supervisor.tick()
    assert launcher.started[-1] == (run.run_id, 5)


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


def test_starts_of_workers_are_observed(runs, launcher, queue_run):
    observer = FakeLaunchObserver()
    supervisor = Supervisor(runs, launcher, SupervisorConfig(backoff_s=0.0), Threads(1, "supervisor"), observer)
    queue_run()
    launcher.fail_with = OSError(errno.ENOENT, "no such program")
    supervisor.tick()
    launcher.fail_with = None
    supervisor.tick()
    supervisor.tick()
    assert observer.outcomes == ["failed_to_start", "started"]


class Ownership:
    """Implements ports.FolderOwnership."""

    def __init__(self):
        self.held, self.lost = True, False

    def is_held(self):
        return self.held

    def is_lost(self):
        return self.lost


async def until(condition):
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


async def test_supervisor_that_fails_is_not_well_until_it_works_again(runs_database, runs, launcher, queue_run):
    """A table that is missing keeps all runs from being looked after."""
    run, observer = queue_run(), FakeLaunchObserver()
    with writing(runs_database) as connection:
        connection.execute(text("ALTER TABLE runs RENAME TO others"))
    config = SupervisorConfig(interval_s=0.01, backoff_s=0.01, max_backoff_s=0.02)
    supervisor = Supervisor(runs, launcher, config, Threads(1, "supervisor"), observer)
    running = asyncio.create_task(supervisor.run())
    await until(lambda: not supervisor.works())
    assert launcher.started == []
    with writing(runs_database) as connection:
        connection.execute(text("ALTER TABLE others RENAME TO runs"))
    await until(supervisor.works)
    running.cancel()
    assert launcher.started == [(run.run_id, 1)]
    assert observer.outcomes[0] == "failed_to_supervise"
    assert observer.outcomes[-1] == "started"


def test_pauses_after_failures_double_up_to_a_limit(runs, launcher):
    supervisor = make_supervisor(runs, launcher, interval_s=0.25, backoff_s=1, max_backoff_s=60)
    pauses = [supervisor._pause_s()]
    for _ in range(8):
        supervisor._note_failure(ValueError("a bug"))
        pauses.append(supervisor._pause_s())
    assert pauses == [0.25, 1, 2, 4, 8, 16, 32, 60, 60]
    for _ in range(2000):
        supervisor._note_failure(ValueError("a bug"))
    assert supervisor._pause_s() == 60
    supervisor._note_success()
    assert supervisor._pause_s() == 0.25


def test_without_a_back_off_there_is_still_a_pause_after_a_failure(runs, launcher):
    supervisor = make_supervisor(runs, launcher, interval_s=0.25, backoff_s=0, max_backoff_s=60)
    supervisor._note_failure(ValueError("a bug"))
    assert supervisor._pause_s() == 0.25


async def test_nothing_is_done_in_a_folder_that_is_not_held(runs, launcher, queue_run, worker):
    run, ownership = queue_run(), Ownership()
    config = SupervisorConfig(interval_s=0.01, exit_grace_s=-1, leftovers_interval_s=-1)
    supervisor = Supervisor(runs, launcher, config, Threads(1, "supervisor"), None, ownership)
    supervisor.tick()
    runs.claim_attempt(run.run_id, 1, worker)
    launcher.alive.clear()
    ownership.held = False
    with pytest.raises(FolderNotHeld):
        supervisor.tick()
    assert runs.get(run.run_id).state is RunState.RUNNING, "another service may look after it"
    running = asyncio.create_task(supervisor.run())
    await until(lambda: not supervisor.works())
    ownership.lost = True
    async with asyncio.timeout(60):
        await supervisor.folder_lost()
    ownership.held = True
    await until(supervisor.works)
    running.cancel()
