"""Our run and the plain loop train in turns, each alone on the machine and for the same wall time.

Our time runs from StartTraining or ResumeTraining until the run is PAUSED or, in the last turn, EXPORTING: its weights
are chosen. So starting a worker, learning the subwords, validations and checkpoints count. Then the plain loop trains
until it has had as much time. Its last turn ends at the planned time or, if ours took longer, at ours: we never have
more time than the plain loop.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from typing import Final, Protocol

from bench.quality.peer import Point
from ferryman import Client
from ferryman.errors import FerrymanError, IllegalTransition
from ferryman.types import MetricRecord, Recipe, RunState, StateChange, TrainingRun, ValidationMetrics

SETTLE_S: Final = 2.0
"""What a worker gets to be gone, and its threads to sleep, before the other one's turn."""
_POLL_S: Final = 0.25
_WORKING: Final = (RunState.QUEUED, RunState.STARTING, RunState.RUNNING)
# What a turn costs besides the start of a worker: its last checkpoint, and the choice of weights.
_END_OF_TURN_S: Final = 1.0
_START_MARGIN: Final = 1.25


class RunFailed(Exception):
    """Our run failed, was cancelled, or was paused by somebody else."""


class Trainer(Protocol):
    """What takes turns."""

    @property
    def seconds(self) -> float:
        """The wall time of all turns so far."""
        ...

    def turn(self, until_s: float, *, last: bool) -> None:
        """Train until so many seconds of all turns are over; in the last turn, to the end."""
        ...


class OurRun:
    """A run of the service, paused between its turns."""

    def __init__(
        self,
        client: Client,
        start: Callable[[], TrainingRun],
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._client = client
        self._start = start
        self._clock = clock
        self._sleep = sleep
        self._run: TrainingRun | None = None
        self._seconds = 0.0

    @property
    def seconds(self) -> float:
        """The wall time of all turns so far."""
        return self._seconds

    @property
    def run(self) -> TrainingRun:
        """The run as it was last seen."""
        assert self._run is not None, "the run starts with its first turn"
        return self._run

    @contextlib.contextmanager
    def cancelled_on_error(self) -> Iterator[None]:
        """Cancel the run if the block fails: a worker outlives its service."""
        try:
            yield
        except BaseException:
            if self._run is not None:
                with contextlib.suppress(FerrymanError):
                    self._client.cancel_training(self._run.run_id)
                    self._client.wait(self._run.run_id)
            raise

    def turn(self, until_s: float, *, last: bool) -> None:
        """Start or resume the run, and pause it in time; in the last turn, wait until its weights are chosen.

        Raises RunFailed.
        """
        if self._run is not None and self._run.state is not RunState.PAUSED:
            return  # it has reached another limit than the time
        began_s = self._clock()
        self._run = self._start() if self._run is None else self._client.resume_training(self._run.run_id)
        while self._look() in _WORKING and (last or self._seconds + self._clock() - began_s < until_s):
            self._sleep(_POLL_S)
        if self._run.state is RunState.PAUSED:
            raise RunFailed(f"run {self._run.run_id} is paused; this benchmark did not pause it")
        if self._run.state in _WORKING:
            with contextlib.suppress(IllegalTransition):  # its weights are chosen meanwhile
                self._client.pause_training(self._run.run_id)
            while self._look() in _WORKING:
                self._sleep(_POLL_S)
        self._seconds += self._clock() - began_s
        while not self.run.state.is_terminal and self.run.state is not RunState.PAUSED:
            self._look()  # the export is in nobody's time
            self._sleep(_POLL_S)

    def _look(self) -> RunState:
        """Ask for the run's state. Raises RunFailed."""
        self._run = self._client.get_training_run(self.run.run_id)
        if self._run.state in (RunState.FAILED, RunState.CANCELLED):
            raise RunFailed(f"run {self._run.run_id} is {self._run.state}: {self._run.error}")
        return self._run.state


def take_turns(
    ours: Trainer,
    peer: Trainer,
    *,
    total_s: float,
    turns: int,
    report: Callable[[int], None] = lambda turn: None,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Let both train for `total_s` seconds in so many turns; ours first, then the plain loop for as long as ours."""
    for number in range(1, turns + 1):
        last = number == turns
        ours.turn(total_s * number / turns, last=last)
        sleep(SETTLE_S)
        peer.turn(max(total_s, ours.seconds) if last else ours.seconds, last=last)
        sleep(SETTLE_S)
        report(number)


def measure_start(client: Client, corpus_id: str, recipe: Recipe, sleep: Callable[[float], None] = time.sleep) -> float:
    """Return the seconds from StartTraining until a worker has the run. The run is cancelled."""
    run = client.start_training(corpus_id, "start", recipe)
    for record in client.stream_metrics(run.run_id):
        match record.payload:
            case StateChange(state=RunState.QUEUED):
                queued = record.time
            case StateChange(state=RunState.RUNNING):
                running = record.time
                break
    with contextlib.suppress(IllegalTransition):  # it has ended already
        client.cancel_training(run.run_id)
    while not client.get_training_run(run.run_id).state.is_terminal:
        sleep(_POLL_S)
    return (running - queued).total_seconds()


def engine_seconds(total_s: float, turns: int, start_s: float) -> float:
    """Return the stop.max_duration_s with which a run needs at most `total_s` of wall time.

    The limit counts neither the start of a worker nor its end.
    """
    return max(total_s / 2, total_s - turns * (_START_MARGIN * start_s + _END_OF_TURN_S))


def our_curve(records: Iterable[MetricRecord]) -> list[Point]:
    """Return the validations of a run over its wall time: that between PAUSED and QUEUED does not count."""
    points: list[Point] = []
    counted_s, since = 0.0, None
    for record in records:
        match record.payload:
            case StateChange(state=RunState.QUEUED) if since is None:
                since = record.time
            case StateChange(state=RunState.PAUSED) if since is not None:
                counted_s, since = counted_s + _seconds(since, record.time), None
            case ValidationMetrics() as found if since is not None:
                seconds = counted_s + _seconds(since, record.time)
                points.append(
                    Point(
                        seconds=round(seconds, 2), step=found.step, bleu=found.bleu, nll_per_token=found.nll_per_token
                    )
                )
    return points


def seconds_to(curve: Sequence[Point], bleu: float) -> float | None:
    """Return the training time of the first validation with at least this BLEU; None if there is none."""
    return next((point.seconds for point in curve if point.bleu >= bleu), None)


def _seconds(start: datetime, end: datetime) -> float:
    return (end - start).total_seconds()
