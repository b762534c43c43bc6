"""Training runs without a service around them: the engine, a folder, and a reporter that keeps every report."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.parallel_text import ParallelLines
from ferryman_service.domain.corpora import CorpusFiles, Side, Split
from ferryman_service.domain.recipe import Recipe
from ferryman_service.domain.records import EventLevel, StepMetrics, ValidationMetrics
from ferryman_service.domain.schedule import DecayPlan
from ferryman_service.domain.training import TrainingJob


@dataclass(frozen=True)
class LocalCorpus:
    """A corpus as the engine wants it."""

    files: CorpusFiles
    digest: str


def write_corpus(folder: Path, train: ParallelLines, validation: ParallelLines) -> LocalCorpus:
    """Write the four files of a corpus into a folder, which is made, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, lines in ((Split.TRAIN, train), (Split.VALIDATION, validation)):
        for side, sentences in ((Side.SOURCE, lines.source), (Side.TARGET, lines.target)):
            text = "".join(f"{sentence}\n" for sentence in sentences)
            (folder / f"{split}.{side}").write_text(text, encoding="utf-8", newline="\n")
    return open_corpus(folder)


def open_corpus(folder: Path) -> LocalCorpus:
    """Return the corpus that `write_corpus` left in a folder."""
    files = {(split, side): folder / f"{split}.{side}" for split in Split for side in Side}
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files.values()]
    return LocalCorpus(CorpusFiles(files=files), hashlib.sha256(" ".join(digests).encode()).hexdigest())


def new_job(name: str, recipe: Recipe, corpus: LocalCorpus, folder: Path, reported_step: int = 0) -> TrainingJob:
    """Return a job whose run lives in `folder`/runs/`name`; tokenised corpora are kept in `folder`/prepared."""
    run_dir = folder / "runs" / name
    run_dir.mkdir(parents=True, exist_ok=True)
    return TrainingJob(
        run_id=name,
        recipe=recipe,
        corpus=corpus.files,
        corpus_digest=corpus.digest,
        run_dir=run_dir,
        prepared_dir=folder / "prepared",
        reported_step=reported_step,
    )


class ListReporter:
    """A Reporter that keeps everything in lists. `check` is called between updates, among other times."""

    def __init__(
        self,
        check: Callable[[], None] = lambda: None,
        on_validation: Callable[[ValidationMetrics], None] = lambda metrics: None,
    ) -> None:
        self.steps: list[StepMetrics] = []
        self.validations: list[ValidationMetrics] = []
        self.decays: list[DecayPlan] = []
        self.events: list[tuple[EventLevel, str, str]] = []
        self._check = check
        self._on_validation = on_validation

    def step(self, metrics: StepMetrics) -> None:
        """Keep an update's report."""
        self.steps.append(metrics)

    def validation(self, metrics: ValidationMetrics) -> None:
        """Keep a validation's report."""
        self.validations.append(metrics)
        self._on_validation(metrics)

    def decay_plan(self, plan: DecayPlan) -> None:
        """Keep a planned decay."""
        self.decays.append(plan)

    def event(self, level: EventLevel, code: str, message: str, *, repeats: bool = False) -> None:
        """Keep an event."""
        self.events.append((level, code, message))

    def resume(self, reports: int) -> None:
        """Nothing is durable here, so nothing is reported twice."""

    def flush(self) -> None:
        """Nothing is on its way."""

    def check(self) -> None:
        """Do what the maker of this reporter wants to be done."""
        self._check()

    def codes(self) -> Sequence[str]:
        """Return the codes of the events, in order."""
        return [code for _, code, _ in self.events]
