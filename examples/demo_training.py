"""The training run of the demo: a time estimate, a pause and resume in the middle, and its outcome."""

from __future__ import annotations

import contextlib
import statistics
from typing import Final

from rich.console import Console

from ferryman import Client
from ferryman.cli.progress import follow
from ferryman.errors import IllegalTransition
from ferryman.types import (
    DecayPlan,
    DecayReason,
    MetricRecord,
    RunState,
    StateChange,
    StepMetrics,
    TrainingRun,
    ValidationMetrics,
)

MEASURED_STEPS: Final = 50
"""The estimate uses the updates up to this one, except the first half, in which caches and threads warm up."""


class DemoRun:
    """Watches the records of a run, prints an estimate of its duration, and pauses and resumes the run once.

    `expected_steps` is the usual number of updates of the run; None if only time limits it. `max_duration_s` is the
    time limit of training.
    """

    def __init__(
        self, client: Client, run_id: str, console: Console, *, expected_steps: int | None, max_duration_s: float
    ) -> None:
        self._client = client
        self._run_id = run_id
        self._console = console
        self._expected_steps = expected_steps
        self._max_duration_s = max_duration_s
        self._step_s: list[float] = []
        self._paused = self._resumed = False
        self.decay: DecayPlan | None = None

    def on_record(self, record: MetricRecord) -> None:
        match record.payload:
            case StepMetrics() as step if len(self._step_s) < MEASURED_STEPS:
                self._step_s.append(step.duration_s)
                if len(self._step_s) == MEASURED_STEPS:
                    self._print_estimate()
            case ValidationMetrics() if not self._paused:
                self._pause()
            case StateChange(state=RunState.PAUSED) if self._paused and not self._resumed:
                self._resume()
            case DecayPlan() as plan:
                self.decay = plan
            case _:
                pass

    def expected_s(self) -> float:
        """Return the estimated duration of training, seconds."""
        if self._expected_steps is None:
            return self._max_duration_s
        step_s = statistics.median(self._step_s[MEASURED_STEPS // 2 :])
        return min(self._max_duration_s, self._expected_steps * step_s)

    def _print_estimate(self) -> None:
        minutes = max(1, round(self.expected_s() / 60))
        until = "" if self._expected_steps is None else ", until the validation reaches its target"
        unit = "minute" if minutes == 1 else "minutes"
        self._console.print(
            f"Training takes about {minutes} {unit} on this machine{until}.", style="bold", soft_wrap=True
        )

    def _pause(self) -> None:
        self._paused = True
        with contextlib.suppress(IllegalTransition):  # a short run may have ended
            self._client.pause_training(self._run_id)
            self._console.print("Pausing the run: it writes a checkpoint and its worker stops.", style="bold")

    def _resume(self) -> None:
        self._resumed = True
        self._client.resume_training(self._run_id)
        self._console.print("Resuming: a new worker continues exactly from the checkpoint.", style="bold")


def train_and_follow(client: Client, run_id: str, console: Console, demo_run: DemoRun) -> TrainingRun:
    """Follow the run until it ends and return it; cancel it on Ctrl-C and on errors."""
    try:
        return follow(client, run_id, console, demo_run.on_record)
    except BaseException:
        with contextlib.suppress(IllegalTransition):  # it has just ended
            client.cancel_training(run_id)
        client.wait(run_id)
        raise


def ran_out_of_time(decay: DecayPlan | None) -> bool:
    """Whether the time limit triggered or shortened the decay."""
    return decay is not None and decay.reason is DecayReason.TIME
