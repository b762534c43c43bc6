"""One update of the weights (Vaswani et al., 2017, sections 5.3 and 5.4).

Shape suffixes: B sentences, T target positions, N target tokens without padding, D model width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Adam

from ferryman_service.domain.recipe import OptimizationRecipe, Recipe
from ferryman_service.domain.runs import FailureReason, TrainingFailed
from ferryman_service.domain.schedule import LearningRateSchedule, learning_rate
from ferryman_service.model.transformer import Transformer
from ferryman_service.training.batches import Batch
from ferryman_service.training.loss import smoothed_cross_entropy
from ferryman_service.training.ranks import Ranks


class ScheduledRate:
    """Keeps the optimizer's learning rate at the schedule's value for the next update."""

    def __init__(self, optimizer: Adam, schedule: LearningRateSchedule, updates_done: int = 0) -> None:
        self._optimizer = optimizer
        self._schedule = schedule
        self._set(updates_done)

    def step(self) -> None:
        """An update was done: go to the next."""
        self._set(self.updates_done + 1)

    def _set(self, updates_done: int) -> None:
        self.updates_done = updates_done
        self.learning_rate = learning_rate(self._schedule, updates_done + 1)
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate


@dataclass(frozen=True)
class Trainee:
    """What an update changes, and what it needs for it."""

    model: Transformer
    optimizer: Adam
    rate: ScheduledRate
    recipe: OptimizationRecipe
    ranks: Ranks


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """What an update found: losses per target token in nats, the gradient's norm before clipping, the learning rate."""

    loss: float
    nll_per_token: float
    gradient_norm: float
    learning_rate: float


def new_trainee(model: Transformer, recipe: Recipe, ranks: Ranks) -> Trainee:
    """Return the model with an optimizer that has done nothing yet."""
    optimization = recipe.optimization
    optimizer = Adam(
        model.parameters(),
        lr=learning_rate(recipe.schedule, 1),
        betas=(optimization.adam_beta1, optimization.adam_beta2),
        eps=optimization.adam_epsilon,
        fused=True,
    )
    return Trainee(model, optimizer, ScheduledRate(optimizer, recipe.schedule), optimization, ranks)


def training_step(trainee: Trainee, batch: Batch | None, target_tokens: int) -> StepOutcome:
    """Do one update with this rank's batch (None: it has none) and return what it found.

    `target_tokens` counts those of all ranks: the loss, and so the gradient, is the mean over them.
    Raises TrainingFailed (NON_FINITE_LOSS).
    """
    model, optimizer, rate = trainee.model, trainee.optimizer, trainee.rate
    optimizer.zero_grad()
    loss, nll = _losses(model, batch, trainee.recipe.label_smoothing, target_tokens)
    if batch is not None:
        loss.backward()  # type: ignore[no-untyped-call]
    loss, nll = loss.detach(), nll.detach()
    trainee.ranks.sum_gradients(model.parameters(), loss, nll)
    gradient_norm = clip_gradient(model, trainee.recipe.clip_norm)
    optimizer.step()
    used_rate = rate.learning_rate
    rate.step()
    outcome = StepOutcome(**_read(loss=loss, nll_per_token=nll, gradient_norm=gradient_norm), learning_rate=used_rate)
    return _finite(outcome, rate.updates_done)


def batch_losses(model: Transformer, batch: Batch, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """Return the sums over the batch's target tokens of smoothed loss and negative log-likelihood."""
    hidden_BTD = model.hidden(batch.source_BS, batch.decoder_input_BT)
    hidden_ND = hidden_BTD.flatten(0, 1)
    if len(hidden_ND) != batch.target_tokens:
        hidden_ND = hidden_ND.index_select(0, batch.label_positions_N)
    return smoothed_cross_entropy(hidden_ND, model.embedding.weight, batch.labels_N, label_smoothing)


def clip_gradient(model: nn.Module, max_norm: float) -> Tensor:
    """Scale the gradient so that its global L2 norm is at most `max_norm` (0: leave it); return the norm before."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if max_norm > 0:
        nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
    return norm


def _losses(
    model: Transformer, batch: Batch | None, label_smoothing: float, target_tokens: int
) -> tuple[Tensor, Tensor]:
    if batch is None:
        zero = model.embedding.weight.new_zeros(())
        return zero, zero.clone()
    loss, nll = batch_losses(model, batch, label_smoothing)
    return loss / target_tokens, nll / target_tokens


def _read(**numbers: Tensor) -> dict[str, float]:
    """Fetch all numbers at once: on a GPU each fetch waits for the queue to drain."""
    return dict(zip(numbers, torch.stack(list(numbers.values())).tolist(), strict=True))


def _finite(outcome: StepOutcome, step: int) -> StepOutcome:
    if math.isfinite(outcome.loss) and math.isfinite(outcome.gradient_norm):
        return outcome
    message = (
        f"step {step}: the loss is {outcome.loss}, the gradient's norm {outcome.gradient_norm}: "
        f"lower the learning rate ({outcome.learning_rate:g} here), warm up longer, or clip the gradient"
    )
    raise TrainingFailed(FailureReason.NON_FINITE_LOSS, message)
