"""The cost of the loop around an update on the CPU: batches, reports, and the store behind them.

    python -m bench.training.overhead

A run's updates are reported by turns to a StoreReporter over SQLite, as in a worker, and to a reporter that does
nothing. Beside the difference in wall time, which a busy machine blurs, all that is not the update itself is added up:
the training thread's time outside it, and the processor time of the thread that writes the records.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import torch

from bench.shared.result import Result, publish, watched_machine
from ferryman_service.application.reporting import ReporterConfig, SilentReporter, StoreReporter
from ferryman_service.domain.corpora import CorpusHeader, SentencePair, Split
from ferryman_service.domain.ids import RUN_PREFIX, new_id
from ferryman_service.domain.recipe import Recipe, SelectionMetric, resolve_recipe
from ferryman_service.domain.records import EventLevel, RunState, StepMetrics, ValidationMetrics
from ferryman_service.domain.runs import TrainingRun
from ferryman_service.domain.schedule import DecayPlan
from ferryman_service.domain.tokens import EOS
from ferryman_service.launch.process import current_process_identity
from ferryman_service.model.config import TransformerConfig
from ferryman_service.model.transformer import Transformer
from ferryman_service.stores.corpora import CorpusLimits, FileCorpusStore
from ferryman_service.stores.database import open_database, upgrade
from ferryman_service.stores.layout import DataFolder
from ferryman_service.stores.runs import SqlRunStore
from ferryman_service.training.batches import Batch
from ferryman_service.training.budget import TimeBudget
from ferryman_service.training.loop import LoopParts, TrainingLoop
from ferryman_service.training.pairs import TokenPairs, TokenSide
from ferryman_service.training.ranks import Ranks
from ferryman_service.training.reporting import Reporter, Series
from ferryman_service.training.scores import ValidationScores
from ferryman_service.training.step import PendingOutcome, Trainee, new_trainee
from ferryman_service.training.validate import Validator

_TARGET_PERCENT: Final = 98.0
_WARMUP_TURNS: Final = 1
_VOCABULARY: Final = 8000
_PAIRS: Final = 29_000


class Alternating:
    """A Reporter that passes everything on to one of two others, by turns of some updates, and takes the time."""

    def __init__(self, reporters: tuple[Reporter, Reporter], updates_per_turn: int) -> None:
        self._reporters = reporters
        self._updates_per_turn = updates_per_turn
        self._done = -1
        self.boundaries_s: list[float] = []

    def check(self) -> None:
        """Note the time between two turns; the loop asks before each update."""
        self._done += 1
        if self._done % self._updates_per_turn == 0:
            self._now.flush()
            self.boundaries_s.append(time.perf_counter())
        self._now.check()

    def step(self, metrics: StepMetrics) -> None:
        """Pass it on."""
        self._now.step(metrics)

    def validation(self, metrics: ValidationMetrics) -> None:
        """Pass it on."""
        self._now.validation(metrics)

    def decay_plan(self, plan: DecayPlan) -> None:
        """Pass it on."""
        self._now.decay_plan(plan)

    def event(self, level: EventLevel, code: str, message: str, *, repeats: bool = False) -> None:
        """Pass it on."""
        self._now.event(level, code, message, repeats=repeats)

    def resume(self, reports: int) -> None:
        """Nothing is resumed here."""

    def flush(self) -> None:
        """Pass it on."""
        self._now.flush()

    @property
    def _now(self) -> Reporter:
        return self._reporters[max(0, self._done) // self._updates_per_turn % 2]


class TimedTrainee:
    """A Trainee, and the seconds that its updates took."""

    def __init__(self, trainee: Trainee) -> None:
        self._trainee = trainee
        self.update_s: list[float] = []

    def step(self, micro_batches: list[Batch], target_tokens: int) -> PendingOutcome:
        """Do an update and wait for its outcome."""
        started_s = time.perf_counter()
        pending = self._trainee.step(micro_batches, target_tokens)
        pending.read()
        self.update_s.append(time.perf_counter() - started_s)
        return pending

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        """Return what the trainee itself has."""
        return getattr(self._trainee, name)


@watched_machine()
def main() -> int:
    """Measure and publish; the exit status is 0 if at least 98 % of the time is the updates'."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=12, help="turns of each of the two reporters")
    parser.add_argument("--updates", type=int, default=10, help="updates in a turn")
    parser.add_argument(
        "--folder", type=Path, default=Path("bench-output/overhead"), help="working folder; it is removed first"
    )
    arguments = parser.parse_args()
    shutil.rmtree(arguments.folder, ignore_errors=True)
    recipe = resolve_recipe(
        {
            "data": {"vocabulary_size": _VOCABULARY},
            "stop": {"max_steps": 2 * (_WARMUP_TURNS + arguments.turns) * arguments.updates},
            "validation": {"interval_steps": 10**9},
        }
    )
    return publish(result(measure(recipe, arguments.folder, arguments.updates)))


@dataclass(frozen=True)
class Turn:
    """The seconds of some updates: with everything around them, and those of the updates alone."""

    with_store: bool
    whole_s: float
    updates_s: float


@dataclass(frozen=True)
class Measurement:
    """All turns after the first ones, and the processor time that the writing thread took for one."""

    turns: Sequence[Turn]
    writing_s: float
    updates_per_turn: int


def measure(recipe: Recipe, folder: Path, updates_per_turn: int) -> Measurement:
    """Train to the recipe's end, by turns with the store and without."""
    store = _open_reporter(folder, recipe)
    store.start()
    writer = next(thread for thread in threading.enumerate() if thread.name == "reporter")
    alternating = Alternating((store, SilentReporter()), updates_per_turn)
    trainee = _new_trainee(recipe)
    pairs = _pairs()
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir()
    parts = LoopParts(
        trainee=cast(Trainee, trainee),
        pairs=lambda epoch: pairs,
        recipe=recipe,
        validator=cast(Validator, _NoValidator()),
        series=Series(alternating),
        checkpoints=checkpoints,
        budget=TimeBudget(0),
    )
    TrainingLoop(parts).run()
    store.flush()
    assert writer.ident is not None, "it has begun"
    writing_s = time.clock_gettime(time.pthread_getcpuclockid(writer.ident))
    store.close()
    turns = [
        Turn(number % 2 == 0, end_s - begin_s, sum(trainee.update_s[number * updates_per_turn :][:updates_per_turn]))
        for number, (begin_s, end_s) in enumerate(itertools.pairwise(alternating.boundaries_s))
    ]
    return Measurement(turns[2 * _WARMUP_TURNS :], 2 * writing_s / len(turns), updates_per_turn)


def result(measured: Measurement) -> Result:
    """Return the line to publish."""
    with_store = [turn for turn in measured.turns if turn.with_store]
    without = [turn for turn in measured.turns if not turn.with_store]
    whole_s = statistics.median(turn.whole_s for turn in with_store)
    outside_s = statistics.median(turn.whole_s - turn.updates_s for turn in with_store)
    pairs = zip(with_store, without, strict=False)
    differences = [100 * (ours.whole_s / theirs.whole_s - 1) for ours, theirs in pairs]
    to_ms = 1000 / measured.updates_per_turn
    return Result(
        bench="overhead",
        value=100 * (1 - (outside_s + measured.writing_s) / whole_s),
        target=_TARGET_PERCENT,
        peer=None,
        details={
            "step_ms": round(whole_s * to_ms, 3),
            "outside_updates_ms": round(outside_s * to_ms, 3),
            "writing_thread_ms": round(measured.writing_s * to_ms, 3),
            "store_against_none_percent": round(statistics.median(differences), 2),
            "store_against_none_spread_percent": round(statistics.pstdev(differences), 2),
            "turns": len(with_store),
        },
    )


class _NoValidator:
    """Stands for a Validator whose scores are not used."""

    was_split = False
    metric = SelectionMetric.BLEU
    bleu_signature = ""

    def score(self, model: Transformer) -> ValidationScores:
        return ValidationScores(loss=0.0, nll_per_token=0.0, bleu=0.0, chrf=0.0, translated_pairs=0)


def _new_trainee(recipe: Recipe) -> TimedTrainee:
    torch.set_flush_denormal(True)
    torch.manual_seed(1)
    model = Transformer(TransformerConfig.from_recipe(recipe, _VOCABULARY)).train()
    return TimedTrainee(new_trainee(model, recipe, Ranks(rank=0, world_size=1, device=torch.device("cpu"))))


def _corpus(corpora: FileCorpusStore) -> str:
    """Store a corpus that is never read; return its id."""
    upload = corpora.begin_upload(CorpusHeader(display_name="", source_language="en", target_language="de"), "")
    for split in Split:
        upload.add_pairs(split, [SentencePair(source="a", target="b")])
    return upload.finish().corpus_id


def _open_reporter(folder: Path, recipe: Recipe) -> StoreReporter:
    """Return the reporter of a claimed attempt in a new data folder."""
    data = DataFolder(folder)
    data.create()
    database = open_database(data.database)
    upgrade(database)
    runs = SqlRunStore(database)
    run = TrainingRun(
        run_id=new_id(RUN_PREFIX),
        state=RunState.QUEUED,
        corpus_id=_corpus(FileCorpusStore(database, data, CorpusLimits())),
        model_name="overhead",
        recipe=recipe,
        create_time_ns=time.time_ns(),
    )
    runs.create(run, None, 1)
    runs.begin_attempt(run.run_id, 0)
    return StoreReporter(runs, runs.claim_attempt(run.run_id, 1, current_process_identity()), ReporterConfig())


def _pairs() -> TokenPairs:
    """Return as many pairs of random tokens as Multi30k has, about as long as its sentences."""
    generator = np.random.default_rng(1)
    sides = []
    for _ in range(2):
        lengths_P = np.clip(generator.normal(14, 4, _PAIRS).round(), 3, 40).astype(np.int64)
        tokens_N = generator.integers(EOS + 1, _VOCABULARY, int(lengths_P.sum()), dtype=np.int32)
        tokens_N[np.cumsum(lengths_P) - 1] = EOS
        sides.append(TokenSide.from_lengths(tokens_N, lengths_P))
    return TokenPairs(*sides)


if __name__ == "__main__":
    sys.exit(main())
