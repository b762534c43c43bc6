"""Kills training workers repeatedly with SIGKILL, at every step and while they write checkpoints. The weights and
metrics must equal those of an unbroken run, to the last bit.

    python -m bench.training.kill --minutes 20

Real workers, real stores. First every step of a run is a kill point, then the points are random until the time is over.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from bench.shared.result import Result, publish, watched_machine
from ferryman_service.domain.corpora import CorpusHeader, SentencePair, Split
from ferryman_service.domain.ids import RUN_PREFIX, new_id
from ferryman_service.domain.recipe import resolve_recipe
from ferryman_service.domain.records import Payload, RunEvent, RunState, StateChange, StepMetrics, ValidationMetrics
from ferryman_service.domain.runs import Handover, TrainingRun
from ferryman_service.domain.schedule import DecayPlan
from ferryman_service.launch.launcher import LaunchConfig, ProcessLauncher
from ferryman_service.stores.corpora import CorpusLimits, FileCorpusStore
from ferryman_service.stores.database import open_database, upgrade
from ferryman_service.stores.layout import DataFolder
from ferryman_service.stores.runs import SqlRunStore

STEPS: Final = 40
_KILLS_PER_RUN: Final = 5
_ATTEMPT_LIMIT_S: Final = 300.0
_LOOK_EVERY_S: Final = 0.003
_STOP_LIMIT_S: Final = 30.0
_WORDS: Final = ("ba", "ce", "di", "fo", "gu", "ka", "le", "mi", "no", "pu")

# Everything that a checkpoint must hold has a part in it. An update takes long enough to be met.
_RECIPE: Final[dict[str, Any]] = {
    "model": {"d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "heads": 2, "ffn_dim": 128, "dropout": 0.1},
    "data": {"vocabulary_size": 50, "max_sentence_tokens": 64, "subword_regularization_alpha": 0.5},
    "schedule": {"warmup_steps": 20},
    "optimization": {"batch_target_tokens": 4096, "accumulation_steps": 2, "ema_decay": 0.9},
    "stop": {"max_steps": STEPS},
    "validation": {"interval_steps": 9, "checkpoint_interval_steps": 2, "max_translated_pairs": 10, "keep_last": 2},
}
_OF_THE_ATTEMPT: Final = (
    "TRAINING_STARTED",
    "RESUMED",
    "RESTARTED",
    "HANDED_OVER",
    "CHECKPOINT_DAMAGED",
    "EXPORT_CHECKED",
)


@dataclass(frozen=True, kw_only=True)
class Look:
    """An observation of a worker: the last durable step, its age, and whether it is writing a checkpoint."""

    step: int
    age_s: float
    is_writing: bool


KillPoint = Callable[[Look], bool]
"""Says whether the time has come."""


def at_step(step: int) -> KillPoint:
    """Kill once a step is durable."""
    return lambda look: look.step >= step


def in_a_write(after_step: int = 0) -> KillPoint:
    """Kill while a checkpoint is being written."""
    return lambda look: look.is_writing and look.step >= after_step


def after_s(seconds: float) -> KillPoint:
    """Kill so long after the start, whatever the worker does then."""
    return lambda look: look.age_s >= seconds


@dataclass(frozen=True, kw_only=True)
class Kill:
    """How a worker died: after which durable step, in which state, and whether it left a checkpoint half-written."""

    step: int
    state: RunState
    left_half_written: bool


@dataclass(frozen=True)
class Outcome:
    """The outcome of a run: its final weights' digest, and its series without what a clock has measured."""

    weights: str
    series: Sequence[Payload]

    def difference(self, other: Outcome) -> str:
        """Return where they differ, "" if they do not."""
        for number, (mine, theirs) in enumerate(zip(self.series, other.series, strict=False)):
            if mine != theirs:
                return f"report {number}: {mine} is not {theirs}"
        if len(self.series) != len(other.series):
            return f"{len(self.series)} reports are not {len(other.series)}"
        return "" if self.weights == other.weights else "the final weights differ"


@dataclass(frozen=True)
class Trial:
    """A run that was killed at some points and then left alone."""

    outcome: Outcome
    kills: Sequence[Kill]
    seconds: float


@dataclass
class Arena:
    """A data folder, and what starts workers in it."""

    folder: DataFolder
    runs: SqlRunStore
    corpus_id: str
    processes: int
    launcher: ProcessLauncher = field(init=False)

    def __post_init__(self) -> None:
        """Make the launcher."""
        config = LaunchConfig(data_dir=self.folder.root, threads_per_worker=1)
        self.launcher = ProcessLauncher(config, self.folder.worker_log, self.folder.scratch_dir)

    def train(self, points: Sequence[KillPoint], number: int = signal.SIGKILL) -> Trial:
        """Let a new run be trained to its end, and its worker die at each of the points, one after the other."""
        run = self._new_run()
        started_s, kills = time.monotonic(), list[Kill]()
        for point in [*points, lambda look: False]:
            if (kill := self._attempt(run.run_id, point, number)) is not None:
                kills.append(kill)
        last = self.runs.get(run.run_id)
        assert last.state is RunState.SUCCEEDED, f"{last.state}: {self.launcher.log_tail(run.run_id, last.attempt)}"
        return Trial(self._outcome(run.run_id), kills, time.monotonic() - started_s)

    def _new_run(self) -> TrainingRun:
        run = TrainingRun(
            run_id=new_id(RUN_PREFIX),
            state=RunState.QUEUED,
            corpus_id=self.corpus_id,
            model_name="kill",
            recipe=resolve_recipe(_RECIPE),
            create_time_ns=time.time_ns(),
            processes=self.processes,
        )
        return self.runs.create(run, None, 1)

    def _attempt(self, run_id: str, point: KillPoint, number: int) -> Kill | None:
        """Start a worker and wait for its end, or bring it about; None if the run has SUCCEEDED meanwhile."""
        run = self.runs.get(run_id)
        if run.state is RunState.SUCCEEDED:
            return None
        started = self.runs.begin_attempt(run_id, run.attempt)
        assert started is not None, f"{run.state} can be trained"
        started_s = time.monotonic()
        self.launcher.start(run_id, started.attempt, self.processes)
        killed = False
        while not killed and self.launcher.is_running(run_id, started.attempt, None):
            look = self._look(run_id, time.monotonic() - started_s)
            assert look.age_s < _ATTEMPT_LIMIT_S, self.launcher.log_tail(run_id, started.attempt)
            if point(look):
                self._kill(run_id, started.attempt, number)
                killed = True
            time.sleep(_LOOK_EVERY_S)
        return self._after(run_id, started.attempt, killed)

    def _look(self, run_id: str, age_s: float) -> Look:
        step = self.runs.get(run_id).progress.step
        return Look(step=step, age_s=age_s, is_writing=bool(self._half_written(run_id)))

    def _half_written(self, run_id: str) -> list[str]:
        folder = self.folder.run_dir(run_id) / "checkpoints"
        names = os.listdir(folder) if folder.exists() else []
        return [name for name in names if not name.startswith("step-")]

    def _kill(self, run_id: str, attempt: int, number: int) -> None:
        worker = self.runs.get(run_id).worker
        if number == signal.SIGKILL:
            if worker is not None and self.processes == 1:
                os.kill(worker.pid, number)  # the launcher looks for the processes first, and a write is soon over
            assert self.launcher.kill(run_id, attempt, worker)
            return
        assert worker is not None, "signals are for workers that have begun"
        os.kill(worker.pid, number)
        deadline_s = time.monotonic() + _STOP_LIMIT_S
        while self.launcher.is_running(run_id, attempt, None):
            assert time.monotonic() < deadline_s, f"no end {_STOP_LIMIT_S:g} s after signal {number}"
            time.sleep(_LOOK_EVERY_S)

    def _after(self, run_id: str, attempt: int, killed: bool) -> Kill | None:
        run = self.runs.get(run_id)
        if run.state is RunState.SUCCEEDED:
            return None
        tail = self.launcher.log_tail(run_id, attempt)
        assert killed and run.state is not RunState.FAILED, f"{run.state}, {run.failure}:\n{tail}"
        if run.state is not RunState.QUEUED:
            self.runs.give_up_attempt(run_id, attempt, Handover(state=RunState.QUEUED, message="killed"))
        half_written = bool(self._half_written(run_id))
        return Kill(step=run.progress.step, state=run.state, left_half_written=half_written)

    def _outcome(self, run_id: str) -> Outcome:
        records = self.runs.records_after(run_id, 0, 100_000)
        sequences = [record.sequence for record in records]
        assert sequences == list(range(1, len(records) + 1)), "a record is missing, or there twice"
        weights = (self.folder.run_dir(run_id) / "weights.safetensors").read_bytes()
        series = [timeless for record in records for timeless in _timeless(record.payload)]
        return Outcome(hashlib.sha256(weights).hexdigest(), series)


def open_arena(folder: Path, processes: int = 1) -> Arena:
    """Make a data folder with a corpus in it."""
    data = DataFolder(folder)
    data.create()
    database = open_database(data.database)
    upgrade(database)
    corpora = FileCorpusStore(database, data, CorpusLimits())
    upload = corpora.begin_upload(CorpusHeader(display_name="", source_language="xx", target_language="yy"), "")
    for split, count in ((Split.TRAIN, 3000), (Split.VALIDATION, 30)):
        upload.add_pairs(split, _pairs(count))
    return Arena(data, SqlRunStore(database), upload.finish().corpus_id, processes)


def kill_points(seed: int, attempt_s: float) -> Iterator[Sequence[KillPoint]]:
    """Yield the points for one run after the other: first every step, then random ones without end."""
    runs = STEPS // _KILLS_PER_RUN
    for first in range(1, runs + 1):
        yield [at_step(first + runs * number) for number in range(_KILLS_PER_RUN)]
    generator = random.Random(seed)
    while True:
        steps = sorted(generator.choices(range(STEPS), k=_KILLS_PER_RUN))
        yield [
            generator.choice((in_a_write(step), after_s(generator.uniform(0.0, attempt_s)), at_step(step)))
            for step in steps
        ]


@watched_machine()
def main() -> int:
    """Kill until the time is over; the exit status is 0 if no kill has left a trace."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--minutes", type=float, default=20.0, help="time limit; at least one run with five kills is made"
    )
    parser.add_argument("--processes", type=int, default=1, help="worker processes that train together")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--folder", type=Path, default=Path("bench-output/kill"), help="working folder; it is removed first"
    )
    arguments = parser.parse_args()
    shutil.rmtree(arguments.folder, ignore_errors=True)
    arena = open_arena(arguments.folder, arguments.processes)
    began_s = time.monotonic()
    unbroken = arena.train([])
    tally = _Tally()
    for points in kill_points(arguments.seed, unbroken.seconds):
        trial = arena.train(points)
        tally.add(trial, trial.outcome.difference(unbroken.outcome))
        print(tally.line(), flush=True)
        if time.monotonic() - began_s > 60 * arguments.minutes:
            break
    return publish(tally.result(arguments.processes, time.monotonic() - began_s))


@dataclass
class _Tally:
    """The kills and outcomes so far."""

    kills: list[Kill] = field(default_factory=list)
    survived: int = 0
    runs: int = 0
    differences: list[str] = field(default_factory=list)

    def add(self, trial: Trial, difference: str) -> None:
        self.runs += 1
        self.kills += trial.kills
        if difference:
            self.differences.append(difference)
        else:
            self.survived += len(trial.kills)

    def line(self) -> str:
        return f"{self.runs} runs, {self.survived} of {len(self.kills)} kills survived {self.differences[-1:] or ''}"

    def result(self, processes: int, seconds: float) -> Result:
        states = [kill.state for kill in self.kills]
        return Result(
            bench="kill" if processes == 1 else f"kill-{processes}-processes",
            value=self.survived,
            target=len(self.kills),
            peer=None,
            details={
                "runs": self.runs,
                "different_steps": len({kill.step for kill in self.kills}),
                "in_a_checkpoint": sum(kill.left_half_written for kill in self.kills),
                "before_training": states.count(RunState.STARTING),
                "while_exporting": states.count(RunState.EXPORTING),
                "differences": self.differences,
                "seconds": round(seconds),
            },
        )


def _pairs(count: int) -> list[SentencePair]:
    generator = random.Random(count)
    sentences = [generator.choices(_WORDS, k=generator.randint(2, 6)) for _ in range(count)]
    return [SentencePair(source=" ".join(s), target=" ".join(reversed(s)).upper()) for s in sentences]


def _timeless(payload: Payload) -> list[Payload]:
    """Return what a report of the series says beside times, in a list; nothing for what belongs to the attempt."""
    match payload:
        case StepMetrics():
            return [
                dataclasses.replace(
                    payload,
                    duration_s=0.0,
                    target_tokens_per_second=0.0,
                    memory_bytes=0,
                    model_flops_utilization=0.0,
                )
            ]
        case ValidationMetrics():
            return [dataclasses.replace(payload, duration_s=0.0)]
        case StateChange():
            return []
        case RunEvent(code=code):
            return [] if code in _OF_THE_ATTEMPT else [payload]
        case DecayPlan():
            return [payload]


if __name__ == "__main__":
    sys.exit(main())
