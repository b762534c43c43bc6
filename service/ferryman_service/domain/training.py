"""What goes into a training engine and what comes out of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ferryman_service.domain.corpora import CorpusFiles
from ferryman_service.domain.models import ModelScores
from ferryman_service.domain.recipe import Recipe
from ferryman_service.domain.schedule import DecayPlan


class RunCancelled(Exception):
    """Raised by Reporter.check: somebody called CancelTraining."""


class PauseRequested(Exception):
    """Raised by Reporter.check: somebody called PauseTraining. A checkpoint is left before it is passed on."""


class StopRequested(Exception):
    """Raised by Reporter.check: this process was told to end. A checkpoint is left before it is passed on."""


class DiskIsFull(Exception):
    """The disk has no room for the run's files. The last checkpoint is intact; the run can go on from it."""


@dataclass(frozen=True, kw_only=True)
class InitialWeights:
    """What fine-tuning starts from: weights (safetensors), their subword model, and the checkpoint whose optimizer
    moments are kept, if `keep_optimizer` wants that. It may be gone (None) once the run has checkpoints of its own."""

    weights: Path
    subwords: Path
    keep_optimizer: bool = False
    checkpoint: Path | None = None


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """What a training engine is given.

    `run_dir` is its own; it exists and may hold an earlier attempt's files. `prepared_dir` is shared by all runs and
    keeps tokenised corpora. A damaged checkpoint is moved to `trash_dir`, if there is one. `reported_step` is the last
    step that an earlier attempt made durable, and `decays` are the decays that earlier attempts planned.
    `corpus_digest` names the corpus's content, `target_language` is a BCP 47 tag.
    """

    run_id: str
    recipe: Recipe
    corpus: CorpusFiles
    run_dir: Path
    prepared_dir: Path
    trash_dir: Path | None = None
    corpus_digest: str = ""
    target_language: str = ""
    reported_step: int = 0
    decays: tuple[DecayPlan, ...] = ()
    initial: InitialWeights | None = None


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """What a training engine leaves: final weights (safetensors), subword model, scores on the validation pairs;
    held-out source sentences (already normalised, at most 64) to check the export with, and held-out pairs (at most
    1,000) to measure what 8-bit arithmetic costs."""

    weights: Path
    subwords: Path
    recipe: Recipe
    scores: ModelScores
    parameters: int
    check_sentences: Sequence[str]
    held_out: Sequence[tuple[str, str]] = ()
