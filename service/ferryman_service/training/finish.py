"""What training ends with: the best checkpoint, the last one or the average of several."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ferryman_service.domain.models import ModelScores, PublishedWeights
from ferryman_service.domain.recipe import Averaging, Recipe
from ferryman_service.domain.records import EventLevel
from ferryman_service.domain.runs import FailureReason, TrainingFailed
from ferryman_service.model.transformer import Transformer
from ferryman_service.training.average import average_checkpoints
from ferryman_service.training.checkpoint import (
    CheckpointDamaged,
    Position,
    checkpoint_path,
    load_weights,
    safetensors_chunks,
    verify_checkpoint,
)
from ferryman_service.training.files import Disk, RunFiles
from ferryman_service.training.reporting import Reporter
from ferryman_service.training.scores import ValidationScores
from ferryman_service.training.significance import compare
from ferryman_service.training.validate import Validator


@dataclass(frozen=True)
class _Candidate:
    """Weights that may be published: how they are called in ModelScores and in events, their scores, their step."""

    weights: PublishedWeights
    name: str
    scores: ValidationScores
    step: int

    def __str__(self) -> str:
        scores = self.scores
        quality = f"BLEU {scores.bleu:.2f}, chrF {scores.chrf:.2f} of {scores.translated_pairs:,} pairs"
        return f"{self.name} ({quality}, {scores.nll_per_token:.4f} nats per token)"


def choose_weights(
    model: Transformer,
    validator: Validator,
    position: Position,
    recipe: Recipe,
    files: RunFiles,
    reporter: Reporter,
    disk: Disk,
) -> ModelScores:
    """Write the weights that training ends with into the run's folder, put them into the model, return their scores.

    The best checkpoint, the last one and the average compete; a difference in the metric counts if a paired bootstrap
    supports it, and the loss decides otherwise. Nothing else is changed, so it can be done again. A damaged checkpoint
    is left out, and an event tells of it; so are weights whose loss is not finite.

    Raises TrainingFailed (NON_FINITE_LOSS) if no other weights are left, or some of those chosen are not finite.
    """
    wanted = [step for step, _ in position.candidates]
    singles = {position.best_step, position.step}
    damaged = {step for step in {*wanted, *singles} if not _is_intact(files.checkpoints, step, reporter)}
    candidates = _single_checkpoints(position, damaged)
    candidates = [each for each in candidates if math.isfinite(each.scores.nll_per_token)]
    several = [_path(files, each) for each in wanted if each not in damaged]
    average: dict[str, Tensor] | None = None
    if len(several) > 1 and recipe.validation.averaging is not Averaging.NONE:
        average = average_checkpoints(several)
        model.load_state_dict(average)
        name = f"the average of the {recipe.validation.averaging} {len(several)} checkpoints"
        averaged = _Candidate(PublishedWeights.AVERAGE, name, validator.score(model), position.step)
        candidates += [averaged] if math.isfinite(averaged.scores.nll_per_token) else []
    if not candidates:
        raise _diverged(position, "the loss on the validation pairs is")
    chosen, remarks = candidates[0], list[str]()
    for candidate in candidates[1:]:
        comparison = compare(candidate.scores, chosen.scores, validator.metric, recipe.seed)
        kept, left = (candidate, chosen) if comparison.is_better else (chosen, candidate)
        remarks.append(f"{kept}, not {left}, {comparison.rule}")
        chosen = kept
    if chosen.weights is PublishedWeights.AVERAGE:
        assert average is not None
        model.load_state_dict(average)
    else:
        model.load_state_dict(load_weights(_path(files, chosen.step)))
    if not all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values()):
        raise _diverged(position, "weights are")
    disk.write(files.weights, safetensors_chunks(model.state_dict()))
    reporter.event(EventLevel.INFO, "WEIGHTS_CHOSEN", "; ".join(remarks) or str(chosen), repeats=True)
    scores = chosen.scores
    return ModelScores(
        bleu=scores.bleu,
        chrf=scores.chrf,
        nll_per_token=scores.nll_per_token,
        weights=chosen.weights,
        step=chosen.step,
        translated_pairs=scores.translated_pairs,
        loss_pairs=validator.loss_pairs,
        bleu_signature=validator.bleu_signature,
    )


def _single_checkpoints(position: Position, damaged: Collection[int]) -> list[_Candidate]:
    """Return the best and the last checkpoint, one if they are the same. Of two that are damaged the last one is
    returned all the same: it was just written or read."""
    assert position.best is not None, "the loop validates before it ends"
    assert position.validated is not None, "the loop validates before it ends"
    found = {position.best_step: position.best, position.step: position.validated}
    intact = [step for step in found if step not in damaged] or [position.step]
    kind = PublishedWeights.CHECKPOINT
    return [_Candidate(kind, f"the checkpoint of step {step}", found[step], step) for step in intact]


def _path(files: RunFiles, step: int) -> Path:
    return checkpoint_path(files.checkpoints, step)


def _diverged(position: Position, what: str) -> TrainingFailed:
    text = (
        f"training has diverged: {what} not finite at its end, step {position.step}, and nothing was published. Lower "
        "the learning rate, warm up longer, or clip the gradient"
    )
    return TrainingFailed(FailureReason.NON_FINITE_LOSS, text)


def _is_intact(checkpoints: Path, step: int, reporter: Reporter) -> bool:
    try:
        verify_checkpoint(checkpoint_path(checkpoints, step))
    except CheckpointDamaged as error:
        reporter.event(EventLevel.WARNING, "CHECKPOINT_DAMAGED", f"{error}; its weights are left out")
        return False
    return True
