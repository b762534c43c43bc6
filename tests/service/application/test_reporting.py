"""Reports become durable in order; the worker hears of cancellation, fencing and full disks."""

import dataclasses
import time

import pytest

from ferryman_service.application.ports import RunCancelled
from ferryman_service.application.reporting import ReporterConfig, StoreReporter
from ferryman_service.domain.errors import AttemptFenced, DiskFull, StoreUnavailable
from ferryman_service.domain.records import EventLevel, RunEvent, RunState, StepMetrics
from ferryman_service.domain.schedule import DecayPlan, DecayReason
from ferryman_service.domain.training import DiskIsFull, PauseRequested, StopRequested

FAST = ReporterConfig(flush_interval_s=0.005, ack_interval_s=0.01)


def step(number, epoch=1, tokens=100):
    values = dict.fromkeys(StepMetrics.__dataclass_fields__, 1)
    return StepMetrics(**values | {"step": number, "epoch": epoch, "target_tokens": tokens, "skipped": False})


def make_reporter(runs, run):
    reporter = StoreReporter(runs, run, FAST)
    reporter.start()
    return reporter


def wait_until_check_raises(reporter, error):
    deadline_s = time.monotonic() + 10
    while time.monotonic() < deadline_s:
        try:
            reporter.check()
        except error as raised:
            return raised
        reporter._thread.join(0.005)
    raise AssertionError(f"check never raised {error.__name__}")


def test_reports_are_stored_in_order_and_summed_up(runs, running_run):
    run = running_run(stop={"max_steps": 100})
    reporter = make_reporter(runs, run)
    for number in range(1, 51):
        reporter.step(step(number))
    reporter.event(EventLevel.WARNING, "SOMETHING", "happened")
    reporter.close()
    records = runs.records_after(run.run_id, run.last_sequence, 1000)
    assert [record.sequence for record in records] == list(range(run.last_sequence + 1, run.last_sequence + 52))
    assert [record.payload.step for record in records[:50]] == list(range(1, 51))
    progress = runs.get(run.run_id).progress
    assert (progress.step, progress.target_tokens, progress.fraction) == (50, 5000, 0.5)
    assert progress.remaining_s >= 0
    assert run.create_time_ns < progress.step_time_ns < time.time_ns()


def test_a_cancellation_reaches_a_worker_that_reports_nothing(runs, running_run):
    run = running_run()
    reporter = make_reporter(runs, run)
    reporter.check()
    runs.request_cancel(run.run_id)
    wait_until_check_raises(reporter, RunCancelled)
    with pytest.raises(RunCancelled):
        reporter.close()


def test_a_worker_whose_run_is_over_is_told_so(runs, running_run):
    run = running_run()
    reporter = make_reporter(runs, run)
    runs.change_state(run.run_id, 1, RunState.FAILED)
    wait_until_check_raises(reporter, AttemptFenced)
    with pytest.raises(AttemptFenced):
        reporter.close()


class FullStore:
    """A run store on a full disk."""

    def append(self, run_id, attempt, payloads, progress):
        raise DiskFull("no space left")


def test_a_full_disk_is_told(running_run):
    reporter = make_reporter(FullStore(), running_run())
    wait_until_check_raises(reporter, DiskIsFull)
    with pytest.raises(DiskIsFull):
        reporter.close()


class BrokenStore:
    """A run store that fails in a way that nobody has thought of."""

    def append(self, run_id, attempt, payloads, progress):
        raise ValueError("Out of range float values are not JSON compliant")


def test_a_bug_in_the_background_is_not_lost(running_run):
    reporter = make_reporter(BrokenStore(), running_run())
    reporter.step(step(1))
    wait_until_check_raises(reporter, ValueError)
    for call in (reporter.flush, reporter.close):
        with pytest.raises(ValueError, match="JSON"):
            call()


class LockedStore:
    """A run store that cannot be reached the first times."""

    def __init__(self, runs, times):
        self.runs, self.times = runs, times

    def append(self, *arguments):
        self.times -= 1
        if self.times >= 0:
            raise StoreUnavailable("the database is locked")
        return self.runs.append(*arguments)


def test_a_store_that_cannot_be_reached_for_a_while_gets_every_report(runs, running_run):
    run = running_run()
    reporter = make_reporter(LockedStore(runs, 5), run)
    reporter.step(step(1))
    reporter.close()
    assert runs.get(run.run_id).progress.step == 1


def test_a_store_that_stays_out_of_reach_is_told_as_such(runs, running_run):
    locked = LockedStore(runs, 10**6)
    reporter = StoreReporter(locked, running_run(), dataclasses.replace(FAST, retry_s=0.02))
    reporter.start()
    wait_until_check_raises(reporter, StoreUnavailable)
    with pytest.raises(StoreUnavailable):
        reporter.flush()


def test_a_pause_and_the_end_of_the_process_reach_the_worker(runs, running_run):
    run = running_run()
    reporter = make_reporter(runs, run)
    runs.request_pause(run.run_id)
    wait_until_check_raises(reporter, PauseRequested)
    reporter.close()
    stopping = StoreReporter(runs, run, FAST, stop_requested=lambda: True)
    with pytest.raises(StopRequested):
        stopping.check()


def test_flushed_reports_are_durable(runs, running_run):
    run = running_run()
    reporter = make_reporter(runs, run)
    for number in range(1, 4):
        reporter.step(step(number))
        reporter.flush()
        assert runs.get(run.run_id).progress.step == number
    reporter.close()


def test_a_resumed_worker_repeats_no_report_of_the_series(runs, running_run):
    run = running_run(stop={"max_steps": 10})
    first = make_reporter(runs, run)
    first.event(EventLevel.INFO, "PREPARED", "", repeats=True)
    for number in range(1, 6):
        first.step(step(number))
    first.event(EventLevel.INFO, "REMARK", "of the first attempt")
    first.close()
    progress = runs.get(run.run_id).progress
    assert (progress.step, progress.reports, progress.target_tokens) == (5, 6, 500)
    second = make_reporter(runs, runs.get(run.run_id))
    second.resume(3)  # from a checkpoint of step 2
    second.event(EventLevel.INFO, "REMARK", "of the second attempt")
    for number in range(3, 8):
        second.step(step(number))
    second.event(EventLevel.INFO, "ENDED", "", repeats=True)
    second.close()
    payloads = [record.payload for record in runs.records_after(run.run_id, run.last_sequence, 100)]
    assert [p.step for p in payloads if isinstance(p, StepMetrics)] == [1, 2, 3, 4, 5, 6, 7]
    assert [p.code for p in payloads if isinstance(p, RunEvent)] == ["PREPARED", "REMARK", "REMARK", "ENDED"]
    progress = runs.get(run.run_id).progress
    assert (progress.step, progress.reports, progress.target_tokens) == (7, 9, 700)


@pytest.mark.parametrize(
    ("stop", "fraction"),
    [({"max_epochs": 4}, 0.25), ({"max_epochs": 4, "max_steps": 20}, 0.5), ({"max_steps": 5}, 1.0)],
)
def test_the_nearest_limit_counts(runs, running_run, stop, fraction):
    run = running_run(stop=stop)
    reporter = make_reporter(runs, run)
    reporter.step(step(10, epoch=2))
    reporter.close()
    assert runs.get(run.run_id).progress.fraction == fraction


def test_planned_decays_are_kept_and_repeated_by_nobody(runs, running_run):
    run = running_run(stop={"max_duration_s": 1000.0})
    plan, shorter = (
        DecayPlan(first_step=first, last_step=last, reason=DecayReason.TIME) for first, last in ((4, 13), (9, 10))
    )
    first = make_reporter(runs, run)
    for number in range(1, 4):
        first.step(step(number))
    first.decay_plan(plan)
    first.flush()
    assert runs.get(run.run_id).progress.decays == (plan,)
    for number in range(4, 9):
        first.step(step(number))
    first.close()
    second = make_reporter(runs, runs.get(run.run_id))
    second.resume(2)  # from a checkpoint of step 2: the plan is reported again
    second.step(step(3))
    second.decay_plan(plan)
    for number in range(4, 9):
        second.step(step(number))
    second.decay_plan(shorter)
    for number in (9, 10):
        second.step(step(number))
    second.close()
    payloads = [record.payload for record in runs.records_after(run.run_id, run.last_sequence, 100)]
    assert [payload for payload in payloads if isinstance(payload, DecayPlan)] == [plan, shorter]
    progress = runs.get(run.run_id).progress
    assert progress.decays == (plan, shorter)
    assert (progress.fraction, progress.remaining_s) == (1.0, 0.0)
