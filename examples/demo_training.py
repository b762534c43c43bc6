"""The demo's training run as a person sees it: how long it will take here, a pause in the middle, and how it ended."""

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
"""The estimate comes from the updates up to this one, without the first half, in which caches and threads warm up."""


class Demonstration:
    """Watches a run's records, tells what to expect, and lets the run pause and resume once.

    `expected_steps` are the updates that the run usually takes, on any machine; None where time is its limit.
    `longest_s` bounds the training, seconds.
    """

    def __init__(
        self, client: Client, run_id: str, console: Console, *, expected_steps: int | None, longest_s: float
    ) -> None:
        """Nothing is asked of the service before the first record."""
        self._client = client
        self._run_id = run_id
        self._console = console
        self._expected_steps = expected_steps
        self._longest_s = longest_s
        self._step_s: list[float] = []
        self._paused = self._resumed = False
        self.decay: DecayPlan | None = None

    def see(self, record: MetricRecord) -> None:
        """Take account of a record."""
        match record.payload:
            case StepMetrics() as step if len(self._step_s) < MEASURED_STEPS:
                self._step_s.append(step.duration_s)
                if len(self._step_s) == MEASURED_STEPS:
                    self._say_what_to_expect()
            case ValidationMetrics() if not self._paused:
                self._pause()
            case StateChange(state=RunState.PAUSED) if self._paused and not self._resumed:
                self._resume()
            case DecayPlan() as plan:
                self.decay = plan
            case _:
                pass

    def expected_s(self) -> float:
        """Return the seconds of training to expect."""
        if self._expected_steps is None:
            return self._longest_s
        step_s = statistics.median(self._step_s[MEASURED_STEPS // 2 :])
        return min(self._longest_s, self._expected_steps * step_s)

    def _say_what_to_expect(self) -> None:
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
            self._console.print("Pausing the run: it writes a checkpoint, and its worker ends.", style="bold")

    def _resume(self) -> None:
        self._resumed = True
        self._client.resume_training(self._run_id)
        self._console.print("Resuming: a new worker continues from the checkpoint, exactly.", style="bold")


def train_and_follow(client: Client, run_id: str, console: Console, demonstration: Demonstration) -> TrainingRun:
    """Follow the run to its end and return it; a run that is left half-way (Ctrl-C) is cancelled."""
    try:
        return follow(client, run_id, console, demonstration.see)
    except BaseException:
        with contextlib.suppress(IllegalTransition):  # it ended on its own just now
            client.cancel_training(run_id)
        client.wait(run_id)
        raise


def ran_out_of_time(decay: DecayPlan | None) -> bool:
    """Tell whether the limit of time began the decay, or shortened it."""
    return decay is not None and decay.reason is DecayReason.TIME
