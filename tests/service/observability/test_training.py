"""Counters of all runs, gauges of the active ones."""

import asyncio

import pytest

from ferryman_service.domain.errors import StoreUnavailable
from ferryman_service.domain.records import RunState, StepMetrics, ValidationMetrics
from ferryman_service.domain.runs import RunProgress
from ferryman_service.observability.training import ObserverConfig, RunObserver


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
        "step_seconds": 0.1,
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
    seconds=1.0,
    best=True,
)


@pytest.fixture
def observer(runs, registry):
    return RunObserver(runs, registry, ObserverConfig())


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


def test_what_was_before_the_first_look_is_not_counted(runs, observer, sample, start_run):
    ended, active = start_run(), start_run()
    runs.append(ended, 1, [step(1)], None)
    runs.change_state(ended, 1, RunState.CANCELLED)
    runs.append(active, 1, [step(1)], RunProgress(step=1, last_step=step(1)))
    observer.look()
    assert sample("ferryman_training_steps_total") == 0
    assert sample("ferryman_training_runs_ended_total", state="cancelled") is None
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


def test_only_so_many_runs_are_shown(runs, registry, sample, start_run):
    observer = RunObserver(runs, registry, ObserverConfig(max_runs=2))
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


def test_a_look_reads_only_so_much_of_a_run(runs, registry, sample, start_run):
    observer = RunObserver(runs, registry, ObserverConfig(max_records=1000))
    observer.look()
    run_id = start_run()
    runs.append(run_id, 1, [step(n) for n in range(1, 1998)], None)  # with the three state changes 2000 records
    runs.change_state(run_id, 1, RunState.FAILED)
    observer.look()
    assert sample("ferryman_training_steps_total") == 997
    assert sample("ferryman_training_runs_ended_total", state="failed") is None
    observer.look()
    observer.look()
    assert sample("ferryman_training_steps_total") == 1997
    assert sample("ferryman_training_runs_ended_total", state="failed") == 1


async def test_it_looks_until_cancelled_and_outlives_a_locked_database(runs, registry, sample, start_run):
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

    observing = asyncio.create_task(RunObserver(Shaky(), registry, ObserverConfig(interval_s=0.001)).run())
    async with asyncio.timeout(10):
        while sample("ferryman_training_runs", state="queued") is None:
            await asyncio.sleep(0.001)
        run_id = start_run()
        runs.append(run_id, 1, [step(1)], None)
        while sample("ferryman_training_steps_total") != 1:
            await asyncio.sleep(0.001)
    observing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await observing
