"""Reports become durable in order; the worker hears of cancellation, fencing and full disks."""

import time

import pytest

from ferryman_service.application.ports import RunCancelled
from ferryman_service.application.reporting import ReporterConfig, StoreReporter
from ferryman_service.domain.errors import AttemptFenced, DiskFull
from ferryman_service.domain.records import EventLevel, RunState, StepMetrics
from ferryman_service.domain.runs import FailureReason, TrainingFailed

FAST = ReporterConfig(flush_interval_s=0.005, ack_interval_s=0.01)


def step(number, epoch=1, tokens=100):
    values = dict.fromkeys(StepMetrics.__dataclass_fields__, 1)
    return StepMetrics(**values | {"step": number, "epoch": epoch, "target_tokens": tokens})


def make_reporter(runs, run):
    reporter = StoreReporter(runs, run.run_id, run.attempt, run.recipe.stop, FAST)
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
    assert progress.remaining_seconds >= 0


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


def test_a_full_disk_fails_the_training(running_run):
    reporter = make_reporter(FullStore(), running_run())
    assert wait_until_check_raises(reporter, TrainingFailed).reason is FailureReason.DISK_FULL
    with pytest.raises(TrainingFailed):
        reporter.close()


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
