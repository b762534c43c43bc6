"""Follows a run at a terminal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from ferryman import (
    Client,
    DecayPlan,
    EventLevel,
    MetricRecord,
    RunError,
    RunEvent,
    RunState,
    StateChange,
    StepMetrics,
    StopRecipe,
    TrainingRun,
    ValidationMetrics,
)
from ferryman.cli.output import styled

_UNEXPLAINED: Final = ("WORKER_DIED", "EXPORT_MISMATCH")
# Later states have no limits left to reach.
_BEFORE_EXPORT: Final = (RunState.QUEUED, RunState.STARTING, RunState.RUNNING, RunState.PAUSED)


@dataclass(frozen=True, kw_only=True)
class RunView:
    """The progress of a run, computed from its records. Times are those of the records.

    A run can be paused or lose its worker: `worked_s` is the running time of its earlier workers, and `start_time` is
    the start of the current one, None without a worker. `decay_start_s` is the elapsed time when the decay was planned.
    """

    state: RunState = RunState.QUEUED
    worked_s: float = 0.0
    start_time: datetime | None = None
    time: datetime | None = None
    step: StepMetrics | None = None
    last_validation: ValidationMetrics | None = None
    decay: DecayPlan | None = None
    decay_start_s: float = 0.0

    def after(self, record: MetricRecord) -> RunView:
        """Return the view updated by a record."""
        view = replace(self, time=record.time)
        match record.payload:
            case StateChange(state=RunState.RUNNING):
                return replace(view, state=RunState.RUNNING, start_time=record.time)
            case StateChange(state=state):
                return replace(view, state=state, worked_s=view.elapsed_s(), start_time=None)
            case StepMetrics() as step:
                return replace(view, step=step)
            case ValidationMetrics() as validation:
                return replace(view, last_validation=validation)
            case DecayPlan() as decay:
                return replace(view, decay=decay, decay_start_s=view.elapsed_s())
            case _:
                return view

    def elapsed_s(self) -> float:
        """Return the running time of all workers, seconds."""
        running_s = (self.time - self.start_time).total_seconds() if self.time and self.start_time else 0.0
        return self.worked_s + running_s

    def fraction(self, stop: StopRecipe) -> float:
        """Return the progress towards the nearest limit, 0 to 1."""
        if self.state not in _BEFORE_EXPORT:
            return 1.0
        step, epoch = (self.step.step, self.step.epoch) if self.step else (0, 1)
        if self.decay is not None:
            return min(1.0, step / self.decay.last_step)
        used = [
            (step, stop.max_steps),
            (epoch - 1, stop.max_epochs),
            (self.elapsed_s(), stop.max_duration_s),
        ]
        return min(1.0, max((done / limit for done, limit in used if limit), default=0.0))

    def remaining_s(self, stop: StopRecipe) -> float | None:
        """Return the estimated time to the nearest limit, seconds; None if unknown."""
        fraction = self.fraction(stop)
        if self.decay is not None and self.step is not None:
            done = self.step.step - self.decay.first_step + 1
            decaying_s = self.elapsed_s() - self.decay_start_s
            return decaying_s * (self.decay.last_step - self.step.step) / done if done > 0 else None
        return self.elapsed_s() * (1 - fraction) / fraction if fraction > 0 and self.step else None


def follow(
    client: Client, run_id: str, console: Console, on_record: Callable[[MetricRecord], None] | None = None
) -> TrainingRun:
    """Follow the run until it ends and return it. Show a progress bar, and a line for each validation, state and event.

    If the console is not a terminal, print only the lines. Calls `on_record` with each record after its line.
    """
    run = client.get_training_run(run_id)
    stop = run.recipe.stop or StopRecipe()
    view = RunView()
    with _progress(console) as progress:
        task = progress.add_task("", total=1.0, numbers="")
        for record in client.stream_metrics(run_id):
            view = view.after(record)
            if (line := describe(record)) is not None:
                progress.console.print(line, soft_wrap=True)
            if view.state is RunState.PAUSED and isinstance(record.payload, StateChange):
                progress.console.print(styled(f"to resume: ferryman runs resume {run_id}"), soft_wrap=True)
            _update(progress, task, view, stop)
            if on_record is not None:
                on_record(record)
    run = client.get_training_run(run_id)
    console.print(describe_end(run), soft_wrap=True)
    return run


def describe(record: MetricRecord) -> Text | None:
    """Return the line for a record; None for a training step, which only updates the progress bar."""
    match record.payload:
        case ValidationMetrics() as validation:
            line = (
                f"step {validation.step:,}: validation loss {validation.loss:.3f}, BLEU {validation.bleu:.1f}, "
                f"chrF {validation.chrf:.1f} ({validation.translated_pairs:,} pairs)"
            )
            return styled(f"{line}, best so far" if validation.best else line, "green" if validation.best else "")
        case StateChange(state=state, message=message):
            return styled(f"{state}: {message}" if message else str(state), "bold")
        case DecayPlan() as decay:
            return styled(describe_decay(decay), "bold")
        case RunEvent(level=level, code=code, message=message):
            return styled(f"{level}: {code}: {message}", "yellow" if level is not EventLevel.INFO else "dim")
        case _:
            return None


def describe_decay(decay: DecayPlan) -> str:
    why = {"time": "the time limit", "target_score": "the target score", "patience": "stop.patience"}
    steps = f"steps {decay.first_step:,} to {decay.last_step:,}"
    return f"learning rate decays over {steps}, then the run ends ({why.get(decay.reason, 'unknown reason')})"


def describe_end(run: TrainingRun) -> Text:
    """Return the final line for a terminal run."""
    if run.state is RunState.SUCCEEDED:
        return styled(f"{run.run_id} succeeded: published {run.model_name}/{run.model_version}", "bold green")
    if run.error is None:
        return styled(f"{run.run_id} {run.state}", "bold yellow")
    lines = [f"{run.run_id} failed: {run.error.reason}: {run.error.message}", *log_lines(run.error)]
    return Text("\n").join(styled(line, "bold red") for line in lines)


def log_lines(error: RunError) -> list[str]:
    """Return the end of the worker's log if the error message does not explain the failure."""
    return error.log_tail.rstrip().splitlines() if error.reason in _UNEXPLAINED else []


def _progress(console: Console) -> Progress:
    # Without rich's time columns, which count from the start of this process, not of the run.
    return Progress(
        BarColumn(bar_width=16),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[numbers]}", markup=False),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def _update(progress: Progress, task: TaskID, view: RunView, stop: StopRecipe) -> None:
    progress.update(task, completed=view.fraction(stop), numbers=numbers(view, stop))


def numbers(view: RunView, stop: StopRecipe) -> str:
    """Return the text beside the bar, most important first: a narrow terminal truncates it."""
    if view.step is None:
        return str(view.state)
    step, remaining_s = view.step, view.remaining_s(stop)
    if view.state is not RunState.RUNNING:
        parts = [str(view.state)]
    else:
        minutes, seconds = divmod(round(remaining_s or 0), 60)
        parts = [f"ETA {minutes}:{seconds:02}"] if remaining_s is not None else []
    parts += [f"step {step.step:,}" + (f"/{stop.max_steps:,}" if stop.max_steps else ""), f"loss {step.loss:.3f}"]
    if view.last_validation is not None:
        parts.append(f"BLEU {view.last_validation.bleu:.1f}")
    parts += [f"lr {step.learning_rate:.2e}", f"{step.target_tokens_per_second:,.0f} target tokens/s"]
    if step.model_flops_utilization:
        parts.append(f"MFU {step.model_flops_utilization:.0%}")
    return "  ".join(parts)
