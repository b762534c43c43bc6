from __future__ import annotations

import io
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from rich.console import Console

from ferryman import DecayPlan, DecayReason, MetricRecord, Recipe, RunState, StateChange, StopRecipe
from ferryman.cli.progress import RunView, describe, follow, numbers
from ferryman.testing import training_script

START = datetime(2026, 1, 1, tzinfo=UTC)
SCRIPT = training_script(steps=4)


def view_after(count: int, seconds_per_record: float = 10.0) -> RunView:
    view = RunView()
    for i, payload in enumerate(SCRIPT[:count]):
        time = START + timedelta(seconds=seconds_per_record * i)
        view = view.after(MetricRecord(sequence=i + 1, time=time, payload=payload))
    return view


def test_elapsed_time_and_fraction_come_from_records():
    # Records 3 (RUNNING) to 5 (step 2): 20 s for 2 of 8 steps.
    view = view_after(5)
    assert view.elapsed_s() == 20
    assert view.fraction(StopRecipe(max_steps=8)) == 0.25
    assert view.remaining_s(StopRecipe(max_steps=8)) == pytest.approx(60)


def test_nearest_limit_determines_fraction():
    view = view_after(5)
    assert view.fraction(StopRecipe(max_steps=100, max_duration_s=25.0)) == 0.8
    assert view.fraction(StopRecipe(max_steps=0, max_epochs=0)) == 0.0
    assert view.remaining_s(StopRecipe()) is None


def changed(view: RunView, state: RunState, at_s: float) -> RunView:
    change = StateChange(state=state, attempt=1)
    return view.after(MetricRecord(sequence=1, time=START + timedelta(seconds=at_s), payload=change))


@pytest.mark.parametrize("how", [[RunState.PAUSED, RunState.QUEUED], [RunState.QUEUED]])
def test_pause_and_restart_do_not_count_as_elapsed_time(how):
    view = view_after(5)
    for seconds, state in enumerate(how, start=50):
        view = changed(view, state, at_s=seconds)
        assert view.fraction(StopRecipe(max_steps=8)) == 0.25
        assert numbers(view, StopRecipe(max_steps=8)).startswith(f"{state}  step 2/8")
    assert view.elapsed_s() == 30
    view = changed(changed(view, RunState.STARTING, at_s=1000), RunState.RUNNING, at_s=1010)
    assert view.elapsed_s() == 30
    view = changed(view, RunState.EXPORTING, at_s=1020)
    assert view.elapsed_s() == 40


def test_paused_run_prints_resume_command(fake, client, corpus):
    fake.script = [*SCRIPT[:5], StateChange(state=RunState.PAUSED, attempt=1, message="the disk is full"), *SCRIPT[5:]]
    run = client.start_training(corpus.corpus_id, "m")
    out = io.StringIO()
    follow(client, run.run_id, Console(file=out))
    assert f"paused: the disk is full\nto resume: ferryman runs resume {run.run_id}\n" in out.getvalue()


def test_before_first_step_only_the_state_is_shown():
    assert numbers(view_after(2), StopRecipe(max_steps=4)) == "starting"
    assert view_after(3).remaining_s(StopRecipe(max_duration_s=10.0)) is None


def test_numbers_beside_the_bar():
    assert numbers(view_after(5), StopRecipe(max_steps=1000)) == (
        "ETA 166:20  step 2/1,000  loss 2.667  lr 3.49e-07  20,000 target tokens/s"
    )
    assert "BLEU 31.5" in numbers(view_after(8), StopRecipe(max_steps=1000))
    on_a_gpu = replace(view_after(5), step=replace(view_after(5).step, model_flops_utilization=0.41))
    assert numbers(on_a_gpu, StopRecipe(max_steps=1000)).endswith("20,000 target tokens/s  MFU 41%")
    exporting = view_after(9)
    assert numbers(exporting, StopRecipe(max_steps=1000)).startswith("exporting  step 4/1,000")
    assert exporting.fraction(StopRecipe(max_steps=1000)) == 1.0


@pytest.mark.parametrize("terminal", [False, True])
def test_follow_prints_events_and_returns_run(client, corpus, terminal):
    run = client.start_training(corpus.corpus_id, "m", Recipe(stop=StopRecipe(max_steps=4)))
    out = io.StringIO()
    end = follow(client, run.run_id, Console(file=out, force_terminal=terminal, width=100))
    assert end.state is RunState.SUCCEEDED
    assert "step 4: validation loss 1.600, BLEU 31.5, chrF 55.0 (2 pairs), best so far" in out.getvalue()
    assert "succeeded: published m/1" in out.getvalue()
    assert ("100 %" in out.getvalue()) == terminal


def test_failed_run_prints_reason(fake, client, corpus):
    fake.script = [*SCRIPT[:5], StateChange(state=RunState.FAILED, attempt=1, message="no [space] left")]
    run = client.start_training(corpus.corpus_id, "m")
    out = io.StringIO()
    assert follow(client, run.run_id, Console(file=out)).state is RunState.FAILED
    assert f"{run.run_id} failed: WORKER_DIED: no [space] left" in out.getvalue()


def test_planned_decay_determines_remaining_time():
    """After the plan the remaining steps are known, whatever the limit of time says."""
    view = view_after(5)
    plan = DecayPlan(first_step=3, last_step=10, reason=DecayReason.TIME)
    view = view.after(MetricRecord(sequence=6, time=START + timedelta(seconds=40), payload=plan))
    step = replace(view.step, step=4)
    view = view.after(MetricRecord(sequence=7, time=START + timedelta(seconds=60), payload=step))
    assert view.fraction(StopRecipe(max_duration_s=1e6)) == pytest.approx(0.4)
    assert view.remaining_s(StopRecipe(max_duration_s=1e6)) == pytest.approx(60)
    line = describe(MetricRecord(sequence=6, time=START, payload=plan))
    assert line.plain == "learning rate decays over steps 3 to 10, then the run ends (the time limit)"
