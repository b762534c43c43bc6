"""What goes into a training engine and what comes out of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ferryman_service.domain.corpora import CorpusFiles
from ferryman_service.domain.models import ModelScores
from ferryman_service.domain.recipe import Recipe


class RunCancelled(Exception):
    """Raised by Reporter.check: somebody called CancelTraining."""


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """What a training engine is given. `run_dir` is its own; it exists and may hold an earlier attempt's files."""

    run_id: str
    recipe: Recipe
    corpus: CorpusFiles
    run_dir: Path


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """What a training engine leaves: final weights (safetensors), subword model, scores on the validation pairs, and
    held-out source sentences (already normalised, at most 64) to check the export with."""

    weights: Path
    subwords: Path
    recipe: Recipe
    scores: ModelScores
    parameters: int
    check_sentences: Sequence[str]
