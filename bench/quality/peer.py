"""The plain loop of the quality benchmark as its caller sees it: its recipe, its files, and the program in turns.

The program is `bench.peers.plain_quality`. It gets the same training pairs in the same subwords as our run, the
number of threads and the environment of our worker, and the wall time that our run took. Its time does not count what
ours pays for: starting the program, learning the subwords, splitting the text, validating, choosing the weights.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from bench.peers.task import PeerTask, task_of, write_ids
from bench.shared.local_training import ListReporter, new_job, write_corpus
from bench.shared.turns import Contestant
from examples.parallel_text import ParallelLines
from ferryman_service.domain.recipe import Recipe
from ferryman_service.launch.launcher import LaunchConfig, worker_environment
from ferryman_service.text.subwords import Subwords
from ferryman_service.training.data import tokenise_validation_pairs
from ferryman_service.training.prepared import prepare_corpus

SUBWORDS: Final = "subwords.model"
TEXTS: Final = "texts.json"
JOB: Final = "job.json"
OUTCOME: Final = "outcome.json"
_PREPARE_THREADS: Final = 2


@dataclass(frozen=True, kw_only=True)
class PlainRecipe:
    """The choices of the plain loop's author: the peak of the rate, and where the layers' norms are.

    `max_tokens` bounds a batch: sentences times the longest of them, on the longer side. The rate rises for
    `warmup_share` of the time and then falls in a straight line, to 0 at the end of the time.
    """

    peak_learning_rate: float
    norm_first: bool
    max_tokens: int = 1024
    warmup_share: float = 0.1
    validations: int = 10


@dataclass(frozen=True, kw_only=True)
class PlainJob:
    """The contents of `job.json`: the model, the recipe, the seconds of training in all."""

    task: PeerTask
    recipe: PlainRecipe
    total_s: float
    seed: int
    max_sentence_tokens: int
    beam_size: int
    has_test: bool = True


@dataclass(frozen=True, kw_only=True)
class Point:
    """A validation: seconds of training before it, BLEU (0 to 100) of greedy translations, nats per target token."""

    seconds: float
    step: int
    bleu: float
    nll_per_token: float


@dataclass(frozen=True, kw_only=True)
class PlainOutcome:
    """The program's outcome: its validations, the one that was selected, the test set's translations, if wanted."""

    curve: Sequence[Point]
    selected: Point
    translations: Sequence[str]


def prepare(folder: Path, recipe: Recipe, train: ParallelLines, validation: ParallelLines, test: Sequence[str]) -> None:
    """Write the text as the plain loop wants it, with the subwords that our run learns from the same pairs."""
    corpus = write_corpus(folder / "corpus", train, validation)
    prepared = prepare_corpus(new_job("subwords", recipe, corpus, folder), ListReporter(), threads=_PREPARE_THREADS)
    subwords = Subwords.load(prepared.subwords)
    held_out = tokenise_validation_pairs(corpus.files, subwords, recipe.data, threads=_PREPARE_THREADS)
    write_ids(prepared.pairs(), folder)
    write_ids(held_out.tokens, folder, "validation")
    (folder / SUBWORDS).write_bytes(prepared.subwords.read_bytes())
    wanted = recipe.validation.max_translated_pairs
    texts = {"sources": held_out.sources[:wanted], "references": held_out.references[:wanted], "test": list(test)}
    (folder / TEXTS).write_text(json.dumps(texts))


def plain_job(folder: Path, recipe: Recipe, plain: PlainRecipe, total_s: float, beam_size: int) -> PlainJob:
    """Return the job with the sizes, the dropout, the smoothing and the clipping of our recipe."""
    sizes = asdict(task_of(recipe, plain.max_tokens))
    subwords = Subwords.load(folder / SUBWORDS)
    return PlainJob(
        task=PeerTask(**sizes | {"vocabulary": subwords.size, "norm_first": plain.norm_first}),
        recipe=plain,
        total_s=total_s,
        seed=recipe.seed,
        max_sentence_tokens=recipe.data.max_sentence_tokens,
        beam_size=beam_size,
    )


class PlainLoop:
    """The program as a Trainer of `bench.quality.turns`."""

    def __init__(self, program: Contestant) -> None:
        self._program = program
        self.seconds = 0.0
        self.bleu = 0.0

    def turn(self, until_s: float, *, last: bool) -> None:
        """Train until so many seconds of all turns are over; the last turn's are all of the program's time."""
        self._program.turn(until_s)
        answer = self._program.turns[-1]
        self.seconds, self.bleu = answer["elapsed_s"], answer["bleu"]


def contestant(folder: Path, job: PlainJob) -> Contestant:
    """Return the program; a turn's number is not its length but the training time, in seconds, at which it ends."""
    (folder / JOB).write_text(json.dumps(asdict(job)))
    (folder / OUTCOME).unlink(missing_ok=True)
    command = [sys.executable, "-m", "bench.peers.plain_quality", "--folder", str(folder)]
    # Workers import nothing from the working folder, where the plain loop is.
    environment = {**worker_environment(LaunchConfig(data_dir=folder), processes=1), "PYTHONSAFEPATH": ""}
    return Contestant("plain loop", command, environment, folder / "plain-loop.log")


def read_job(folder: Path) -> PlainJob:
    """Return the job that `contestant` wrote."""
    values: dict[str, Any] = json.loads((folder / JOB).read_text())
    return PlainJob(**values | {"task": PeerTask(**values["task"]), "recipe": PlainRecipe(**values["recipe"])})


def write_outcome(folder: Path, outcome: PlainOutcome) -> None:
    """Leave what `read_outcome` returns."""
    (folder / OUTCOME).write_text(json.dumps(asdict(outcome)))


def read_outcome(folder: Path) -> PlainOutcome:
    """Return what the program left at the end of its time."""
    values: dict[str, Any] = json.loads((folder / OUTCOME).read_text())
    return PlainOutcome(
        curve=[Point(**point) for point in values["curve"]],
        selected=Point(**values["selected"]),
        translations=values["translations"],
    )
