"""Counters of all runs, gauges of the active ones."""

import asyncio

import pytest

from ferryman_service.domain.errors import StoreUnavailable
from ferryman_service.domain.records import EventLevel, RunEvent, RunState, StepMetrics, ValidationMetrics
from ferryman_service.domain.runs import CheckpointInfo, Handover, ProcessIdentity, RunProgress
from ferryman_service.domain.threads import Threads
from ferryman_service.observability.store import StoreMetrics
from ferryman_service.observability.training import ObserverConfig, RunObserver
from tests.fakes.busy_threads import busy_threads


def step(number, **changes):
    values = {
        "step": number,
        "epoch": 1,
        "loss": 5.5,
        "nll_per_token": 5.25,
        "perplexity": 190.5,
        "learning_rate": 0.001,
        "gradient_norm": 1.5,
        "target_tokens": 100,
        "target_tokens_per_second": 1000.0,
        "duration_s": 0.1,
        "padding_share": 0.25,
        "memory_bytes": 1 << 20,
        "model_flops_utilization": 0.375,
    }
    return StepMetrics(**values | changes)


VALIDATION = ValidationMetrics(
    step=2,
    epoch=1,
    loss=4.5,
    nll_per_token=4.25,
    perplexity=70.5,
    bleu=12.5,
    chrf=40.5,
    translated_pairs=10,
    duration_s=1.0,
    best=True,
)


class Checkpoints:
    """The checkpoints that the test puts there, by run."""

    def __init__(self):
        self.there = {}

    def write(self, run_id, step, create_time_ns=0):
        info = CheckpointInfo(step=step, epoch=1, create_time_ns=create_time_ns, size_bytes=1, is_best=False)
        self.there.setdefault(run_id, []).append(info)

    def checkpoints(self, run_id):
        return tuple(self.there.get(run_id, ()))


class Clock:
    """Stands still at `ns`."""

    ns = 1_000_000_000_000

    def __call__(self):
        return self.ns


@pytest.fixture
def checkpoints():
    return Checkpoints()


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def observe(runs, checkpoints, registry, clock):
    """A maker of observers: one for each registry."""

    def make(of=None, registry=registry, **config):
        return RunObserver(
            of or runs,
            checkpoints,
            registry,
            StoreMetrics(registry),
            ObserverConfig(**config),
            Threads(1, "observer"),
            now_ns=clock,
        )

    return make


@pytest.fixture
def observer(observe):
    return observe()


def test_steps_are_counted_once(runs, observer, sample, start_run):
    observer.look()
    run_id = start_run()
    runs.append(run_id, 1, [step(1), step(2, target_tokens=50)], None)
    observer.look()
    runs.append(run_id, 1, [step(3)], None)
    observer.look()
    observer.look()
    assert sample("ferryman_training_steps_total") == 3
    assert sample("ferryman_training_target_tokens_total") == 250
    assert sample("ferryman_training_step_seconds_count") == 3
    assert sample("ferryman_training_step_seconds_sum") == pytest.approx(0.3)


def test_gauges_show_the_last_of_an_active_run(runs, observer, sample, start_run):
    run_id = start_run()
    observer.look()
    runs.append(run_id, 1, [step(1), VALIDATION, step(2, loss=4.0)], None)
    observer.look()
    assert sample("ferryman_training_run_step", run=run_id) == 2
    assert sample("ferryman_training_run_loss", run=run_id) == 4.0
    assert sample("ferryman_training_run_learning_rate", run=run_id) == 0.001
    assert sample("ferryman_training_run_gradient_norm", run=run_id) == 1.5
    assert sample("ferryman_training_run_target_tokens_per_second", run=run_id) == 1000
    assert sample("ferryman_training_run_model_flops_utilization", run=run_id) == 0.375
    assert sample("ferryman_training_run_validation_bleu", run=run_id) == 12.5


def test_a_run_that_ends_between_two_looks_is_counted_to_its_end(runs, observer, sample, start_run, registry):
    run_id = start_run()
    observer.look()
    runs.append(run_id, 1, [step(1)], None)
    observer.look()
    runs.append(run_id, 1, [step(2), step(3)], None)
    runs.change_state(run_id, 1, RunState.FAILED)
    observer.look()
    assert sample("ferryman_training_steps_total") == 3
    assert sample("ferryman_training_runs_ended_total", state="failed") == 1
    assert run_id not in [s.labels.get("run") for metric in registry.collect() for s in metric.samples]
    observer.look()
    assert sample("ferryman_training_runs_ended_total", state="failed") == 1


def test_a_run_that_lives_between_two_looks_is_counted(runs, observer, sample, start_run, queue_run):
    observer.look()
    short = start_run()
    runs.append(short, 1, [step(1)], None)
    runs.change_state(short, 1, RunState.FAILED)
    runs.request_cancel(queue_run())
    observer.look()
    observer.look()
    assert sample("ferryman_training_steps_total") == 1
    assert sample("ferryman_training_runs_ended_total", state="failed") == 1
    assert sample("ferryman_training_runs_ended_total", state="cancelled") == 1


def test_events_before_the_first_look_are_not_counted(runs, observer, sample, start_run):
    ended, active = start_run(), start_run()
    runs.append(ended, 1, [step(1)], None)
    runs.change_state(ended, 1, RunState.CANCELLED)
    runs.append(active, 1, [step(1)], RunProgress(step=1, last_step=step(1)))
    observer.look()
    assert sample("ferryman_training_steps_total") == 0
    assert sample("ferryman_training_runs_ended_total", state="cancelled") == 0
    # But what an active run has reached is shown at once.
    assert sample("ferryman_training_run_step", run=active) == 1
    runs.append(active, 1, [step(2)], None)
    observer.look()
    assert sample("ferryman_training_steps_total") == 1


def test_runs_are_counted_by_state(runs, observer, sample, start_run, queue_run):
    queue_run()
    queue_run()
    run_id = start_run()
    observer.look()
    assert sample("ferryman_training_runs", state="queued") == 2
    assert sample("ferryman_training_runs", state="running") == 1
    runs.change_state(run_id, 1, RunState.CANCELLED)
    observer.look()
    assert sample("ferryman_training_runs", state="running") == 0


def test_only_so_many_runs_are_shown(runs, observe, sample, start_run):
    observer = observe(max_runs=2)
    first, second, third = (start_run() for _ in range(3))
    for run_id in (first, second, third):
        runs.append(run_id, 1, [step(1)], RunProgress(last_step=step(1)))
    observer.look()
    assert sample("ferryman_training_run_step", run=third) is None
    runs.change_state(first, 1, RunState.CANCELLED)
    runs.append(third, 1, [step(2)], None)
    observer.look()
    observer.look()
    runs.append(third, 1, [step(3)], None)
    observer.look()
    assert sample("ferryman_training_run_step", run=third) == 3


def test_a_look_reads_only_so_much_of_a_run(runs, observe, sample, start_run):
    observer = observe(max_records=1000)
    observer.look()
    run_id = start_run()
    runs.append(run_id, 1, [step(n) for n in range(1, 1998)], None)  # with the three state changes 2000 records
    runs.change_state(run_id, 1, RunState.FAILED)
    observer.look()
    assert sample("ferryman_training_steps_total") == 997
    assert sample("ferryman_training_runs_ended_total", state="failed") == 0
    observer.look()
    observer.look()
    assert sample("ferryman_training_steps_total") == 1997
    assert sample("ferryman_training_runs_ended_total", state="failed") == 1


async def test_observer_runs_until_cancelled_and_outlives_a_locked_database(runs, observe, sample, start_run):
    class Shaky:
        """The store, failing at every other look."""

        looks = 0

        def unfinished(self):
            self.looks += 1
            if self.looks % 2:
                raise StoreUnavailable("locked")
            return runs.unfinished()

        list_page = runs.list_page
        records_after = runs.records_after

    observing = asyncio.create_task(observe(Shaky(), interval_s=0.001).run())
    async with busy_threads(), asyncio.timeout(30):
        while sample("ferryman_training_runs", state="queued") is None:
            await asyncio.sleep(0.001)
        run_id = start_run()
        runs.append(run_id, 1, [step(1)], None)
        while sample("ferryman_training_steps_total") != 1:
            await asyncio.sleep(0.001)
    observing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await observing


def run_labels(registry):
    """The runs that any gauge shows."""
    return {
        sample.labels["run"] for family in registry.collect() for sample in family.samples if "run" in sample.labels
    }


def test_skipped_updates_and_restarts_are_counted(runs, observer, sample, start_run):
    observer.look()
    run_id = start_run()
    remark = RunEvent(level=EventLevel.WARNING, code="RESTARTED", message="")
    other = RunEvent(level=EventLevel.WARNING, code="UPDATE_SKIPPED", message="")
    runs.append(run_id, 1, [step(1), step(2, skipped=True), other, step(3)], None)
    runs.give_up_attempt(run_id, 1, Handover(state=RunState.QUEUED, message="", remark=remark, restarts=1))
    observer.look()
    observer.look()
    assert sample("ferryman_training_skipped_updates_total") == 1
    assert sample("ferryman_training_restarts_total") == 1
    assert sample("ferryman_training_run_restarts", run=run_id) == 1


def test_checkpoints_are_counted_once_and_those_of_before_are_not(runs, observer, checkpoints, sample, start_run):
    old = start_run()
    checkpoints.write(old, 10)
    observer.look()
    run_id = start_run()
    checkpoints.write(run_id, 1)
    runs.append(run_id, 1, [step(1)], None)
    observer.look()
    checkpoints.write(run_id, 2)
    checkpoints.write(old, 20)
    runs.append(run_id, 1, [step(2)], None)
    runs.append(old, 1, [step(20)], None)
    observer.look()
    assert sample("ferryman_training_checkpoints_total") == 3
    del checkpoints.there[run_id][0]
    checkpoints.write(run_id, 1, create_time_ns=5)  # again, after a return to an earlier one
    runs.append(run_id, 1, [step(1)], None)
    observer.look()
    observer.look()
    assert sample("ferryman_training_checkpoints_total") == 4
    checkpoints.write(run_id, 3)
    runs.change_state(run_id, 1, RunState.CANCELLED)
    observer.look()
    assert sample("ferryman_training_checkpoints_total") == 5, "the last one is seen at the run's end"


def test_the_age_of_the_newest_step_is_measured_once(runs, observer, clock, sample, start_run):
    before = start_run()
    runs.append(before, 1, [step(1)], RunProgress(step=1, last_step=step(1), step_time_ns=clock.ns - 60 * 10**9))
    observer.look()
    assert sample("ferryman_store_lag_seconds_count") == 0, "nobody looked when that step came"
    runs.append(before, 1, [step(2)], RunProgress(step=2, last_step=step(2), step_time_ns=clock.ns - 2 * 10**9))
    observer.look()
    observer.look()
    assert sample("ferryman_store_lag_seconds_count") == 1
    assert sample("ferryman_store_lag_seconds_sum") == pytest.approx(2)
    runs.append(before, 1, [step(3)], RunProgress(step=3, last_step=step(3), step_time_ns=clock.ns + 10**9))
    observer.look()
    assert sample("ferryman_store_lag_seconds_sum") == pytest.approx(2), "a clock that was set back is no lag"


def test_progress_start_and_share(runs, observer, sample, start_run, queue_run):
    waiting, run_id = queue_run(), start_run()
    observer.look()
    started_s = runs.get(run_id).start_time_ns / 1e9
    assert sample("ferryman_training_run_started_timestamp_seconds", run=run_id) == pytest.approx(started_s, abs=1e-3)
    assert sample("ferryman_training_run_started_timestamp_seconds", run=waiting) is None
    claimed = [record.time_ns for record in runs.records_after(run_id, 0, 10)][-1]
    last = "ferryman_training_run_last_progress_timestamp_seconds"
    assert sample(last, run=run_id) == pytest.approx(claimed / 1e9, abs=1e-3)
    runs.append(run_id, 1, [step(1)], RunProgress(step=1, last_step=step(1), fraction=0.25))
    observer.look()
    stepped = sample(last, run=run_id)
    assert stepped > claimed / 1e9
    assert sample("ferryman_training_run_progress_ratio", run=run_id) == 0.25
    runs.append(run_id, 1, [RunEvent(level=EventLevel.INFO, code="X", message="")], None)
    observer.look()
    assert sample(last, run=run_id) == stepped, "a remark is no progress"
    runs.give_up_attempt(run_id, 1, Handover(state=RunState.QUEUED, message=""))
    observer.look()
    assert sample(last, run=run_id) == stepped, "to wait for another worker is none either"
    runs.begin_attempt(run_id, 1)
    runs.claim_attempt(run_id, 2, ProcessIdentity(pid=1, start_ticks=1, boot_id="boot"))
    observer.look()
    assert sample(last, run=run_id) > stepped


def test_a_service_that_starts_again_shows_what_active_runs_have_reached(runs, observe, sample, start_run, registry):
    ended, active = start_run(), start_run()
    for run_id in (ended, active):
        progress = RunProgress(step=1500, last_step=step(1500), fraction=0.5)
        runs.append(run_id, 1, [VALIDATION, *(step(number) for number in range(1, 1501))], progress)
    runs.change_state(ended, 1, RunState.FAILED)
    observe().look()
    assert run_labels(registry) == {active}
    assert sample("ferryman_training_run_step", run=active) == 1500
    assert sample("ferryman_training_run_validation_bleu", run=active) == 12.5
    newest = runs.records_after(active, runs.get(active).last_sequence - 1, 1)[0].time_ns / 1e9
    last = sample("ferryman_training_run_last_progress_timestamp_seconds", run=active)
    assert last == pytest.approx(newest, abs=1e-3)


@pytest.mark.parametrize("end", [RunState.FAILED, RunState.CANCELLED])
def test_nothing_is_left_of_a_run_that_has_ended(runs, observer, registry, start_run, end):
    observer.look()
    before = {(s.name, *s.labels.items()) for family in registry.collect() for s in family.samples}
    run_id = start_run()
    runs.append(run_id, 1, [step(1), VALIDATION], RunProgress(step=1, last_step=step(1), fraction=0.5))
    observer.look()
    assert run_labels(registry) == {run_id}
    runs.change_state(run_id, 1, end)
    observer.look()
    observer.look()
    assert {(s.name, *s.labels.items()) for family in registry.collect() for s in family.samples} == before


def test_nothing_is_left_of_a_run_that_was_deleted(runs, observer, registry, start_run):
    run_id = start_run()
    observer.look()
    assert run_labels(registry) == {run_id}
    runs.change_state(run_id, 1, RunState.FAILED)
    runs.delete(run_id)
    observer.look()
    assert run_labels(registry) == set()
