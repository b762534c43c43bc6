"""What training ends with: the best checkpoint or the average of several, whichever has the better score."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from ferryman_service.domain.models import ModelScores
from ferryman_service.domain.recipe import Averaging, ValidationRecipe
from ferryman_service.domain.records import EventLevel
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
from ferryman_service.training.validate import Validator


def choose_weights(
    model: Transformer,
    validator: Validator,
    position: Position,
    recipe: ValidationRecipe,
    files: RunFiles,
    reporter: Reporter,
    disk: Disk,
) -> ModelScores:
    """Write the weights that training ends with into the run's folder, put them into the model, return their scores.

    Nothing else is changed, so it can be done again. A damaged checkpoint is left out, and an event tells of it.
    """
    wanted = [step for step, _ in position.candidates]
    damaged = {step for step in {*wanted, position.best_step} if not _is_intact(files.checkpoints, step, reporter)}
    scores, step = _best(position, damaged)
    best, weights = checkpoint_path(files.checkpoints, step), "best"
    remark = f"the checkpoint of step {step} ({_describe(scores)})"
    several = [checkpoint_path(files.checkpoints, each) for each in wanted if each not in damaged]
    if len(several) > 1 and recipe.averaging is not Averaging.NONE:
        model.load_state_dict(average_checkpoints(several))
        average = validator.score(model)
        other = f"the average of the {recipe.averaging} {len(several)} checkpoints ({_describe(average)})"
        if average.rank(recipe.metric) > scores.rank(recipe.metric):
            scores, step, weights = average, position.step, "average"
            remark, other = other, remark
        remark = f"{remark}, not {other}"
    if weights == "best":
        model.load_state_dict(load_weights(best))
    disk.write(files.weights, safetensors_chunks(model.state_dict()))
    reporter.event(EventLevel.INFO, "WEIGHTS_CHOSEN", remark, repeats=True)
    return ModelScores(
        bleu=scores.bleu, chrf=scores.chrf, nll_per_token=scores.nll_per_token, weights=weights, step=step
    )


def _best(position: Position, damaged: Collection[int]) -> tuple[ValidationScores, int]:
    """Return the best checkpoint's scores and step; if it is damaged, those of the last one, which was just written or
    read."""
    assert position.best is not None, "the loop validates before it ends"
    assert position.validated is not None, "the loop validates before it ends"
    if position.best_step in damaged:
        return position.validated, position.step
    return position.best, position.best_step


def _is_intact(checkpoints: Path, step: int, reporter: Reporter) -> bool:
    try:
        verify_checkpoint(checkpoint_path(checkpoints, step))
    except CheckpointDamaged as error:
        reporter.event(EventLevel.WARNING, "CHECKPOINT_DAMAGED", f"{error}; its weights are left out")
        return False
    return True


def _describe(scores: ValidationScores) -> str:
    return f"BLEU {scores.bleu:.2f}, chrF {scores.chrf:.2f}, {scores.nll_per_token:.4f} nats per token"
