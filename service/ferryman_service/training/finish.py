"""What training ends with: the best checkpoint or the average of several, whichever has the better score."""

from __future__ import annotations

from ferryman_service.domain.models import ModelScores
from ferryman_service.domain.recipe import Averaging, ValidationRecipe
from ferryman_service.domain.records import EventLevel
from ferryman_service.model.transformer import Transformer
from ferryman_service.training.average import average_checkpoints
from ferryman_service.training.checkpoint import Position, checkpoint_path, load_weights, to_bytes
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
) -> ModelScores:
    """Write the weights that training ends with into the run's folder, put them into the model, return their scores."""
    assert position.best is not None, "the loop validates before it ends"
    scores, step, weights = position.best, position.best_step, "best"
    remark = f"the checkpoint of step {step} ({_describe(scores)})"
    several = [checkpoint_path(files.checkpoints, candidate) for candidate, _ in position.candidates]
    if len(several) > 1 and recipe.averaging is not Averaging.NONE:
        model.load_state_dict(average_checkpoints(several))
        average = validator.score(model)
        other = f"the average of the {recipe.averaging} {len(several)} checkpoints ({_describe(average)})"
        if average.rank(recipe.metric) > scores.rank(recipe.metric):
            scores, step, weights = average, position.step, "average"
            remark, other = other, remark
        remark = f"{remark}, not {other}"
    if weights == "best":
        model.load_state_dict(load_weights(checkpoint_path(files.checkpoints, step)))
    Disk().write(files.weights, to_bytes(model.state_dict()))
    reporter.event(EventLevel.INFO, "WEIGHTS_CHOSEN", remark, repeats=True)
    return ModelScores(
        bleu=scores.bleu, chrf=scores.chrf, nll_per_token=scores.nll_per_token, weights=weights, step=step
    )


def _describe(scores: ValidationScores) -> str:
    return f"BLEU {scores.bleu:.2f}, chrF {scores.chrf:.2f}, {scores.nll_per_token:.4f} nats per token"
