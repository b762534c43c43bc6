"""One update of the weights (Vaswani et al., 2017, sections 5.3 and 5.4).

Shape suffixes: B sentences, T target positions, N target tokens without padding, D model width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from ferryman_service.domain.recipe import Precision, Recipe
from ferryman_service.domain.runs import FailureReason, TrainingFailed
from ferryman_service.domain.schedule import learning_rate
from ferryman_service.model.transformer import Transformer
from ferryman_service.training.batches import Batch
from ferryman_service.training.ema import MovingAverage
from ferryman_service.training.loss import r_drop_loss, smoothed_cross_entropy
from ferryman_service.training.precision import DTYPES, LossScale, autocast
from ferryman_service.training.ranks import Ranks

MOMENTS: Final = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class TraineeCounters:
    """What a trainee holds beside tensors: updates done (skipped ones too) and applied, the factor on the schedule's
    learning rate, the loss scale and the finite gradients since it changed."""

    updates_done: int = 0
    updates_applied: int = 0
    rate_scale: float = 1.0
    loss_scale: float = 1.0
    loss_scale_good_steps: int = 0


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """What an update found: losses per target token in nats, the gradient's norm before clipping, the learning rate.

    `skipped`: the norm is not finite and nothing was changed. `split`: the batch did not fit, halves of it did.
    """

    loss: float
    nll_per_token: float
    gradient_norm: float
    learning_rate: float
    skipped: bool = False
    split: bool = False


class PendingOutcome:
    """The outcome of an update that a GPU may still be computing. Its numbers are on their way to the CPU."""

    def __init__(self, numbers: Tensor, learning_rate: float, *, split: bool) -> None:
        self._learning_rate = learning_rate
        self._split = split
        self._event: torch.cuda.Event | None = None
        self._numbers = numbers
        if numbers.is_cuda:
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def is_ready(self) -> bool:
        """Whether `read` would return at once."""
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]

    def read(self) -> StepOutcome:
        """Return the outcome, waiting for it if need be."""
        if self._event is not None:
            self._event.synchronize()
        loss, nll, norm = self._numbers.tolist()
        return StepOutcome(
            loss=loss,
            nll_per_token=nll,
            gradient_norm=norm,
            learning_rate=self._learning_rate,
            skipped=not math.isfinite(norm),
            split=self._split,
        )


class Trainee:
    """What is trained: a model, its optimizer, and what an update needs. Make one with `new_trainee`."""

    def __init__(self, model: Transformer, recipe: Recipe, ranks: Ranks, optimizer: AdamW) -> None:
        self.model = model
        self.ranks = ranks
        self._seed = recipe.seed
        self._recipe = recipe.optimization
        self._schedule = recipe.schedule
        self._optimizer = optimizer
        self._scale = LossScale(self._recipe.precision, ranks.device)
        self._average = MovingAverage(model, self._recipe.ema_decay) if self._recipe.ema_decay else None
        self._rate_scale = 1.0
        self._updates_done = 0

    def step(self, micro_batches: Sequence[Batch], target_tokens: int) -> PendingOutcome:
        """Do one update with this rank's micro-batches (none: it has no share in this one).

        `target_tokens` counts those of all ranks: the loss, and so the gradient, is the mean over them. An update whose
        gradient is not finite is skipped on the device, without anybody waiting for the news.
        Raises TrainingFailed (OUT_OF_MEMORY).
        """
        sums, split = self._gradients(micro_batches, target_tokens)
        self.ranks.sum_gradients(self.model.parameters(), sums)
        gradients = [gradient for p in self.model.parameters() if (gradient := p.grad) is not None]
        self._scale.remove(gradients)
        norm = clip_gradient(self.model, self._recipe.clip_norm)
        not_finite = torch.isfinite(norm).logical_not().to(torch.float32)
        self._scale.update(not_finite)
        rate = self._rate_scale * learning_rate(self._schedule, self._updates_done + 1)
        self._optimizer.found_inf = not_finite  # type: ignore[attr-defined]
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._updates_done += 1
        if self._average is not None:
            self._average.update(self._updates_done)
        return PendingOutcome(torch.cat((sums, norm.to(sums.dtype).view(1))), rate, split=split)

    def scale_rate(self, factor: float) -> None:
        """Multiply the learning rate from now on."""
        self._rate_scale *= factor

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return, by group and parameter name, all tensors that the next updates depend on; not copies."""
        groups: dict[str, dict[str, Tensor]] = {"weights": dict(self.model.named_parameters())}
        for moment in MOMENTS:
            groups[moment] = {name: self._moments(p)[moment] for name, p in self.model.named_parameters()}
        if self._average is not None:
            groups["ema"] = self._average.tensors
        return {group: {name: tensor.detach() for name, tensor in tensors.items()} for group, tensors in groups.items()}

    def counters(self) -> TraineeCounters:
        """Return what the next updates depend on beside tensors."""
        scale, good_steps = self._scale.state()
        applied = self._moments(next(self.model.parameters()))["step"]
        return TraineeCounters(
            updates_done=self._updates_done,
            updates_applied=int(applied),
            rate_scale=self._rate_scale,
            loss_scale=scale,
            loss_scale_good_steps=good_steps,
        )

    def load(self, tensors: Mapping[str, Mapping[str, Tensor]], counters: TraineeCounters) -> None:
        """Take back what `tensors` and `counters` returned."""
        self.model.load_state_dict(dict(tensors["weights"]))
        self.load_moments(tensors, counters.updates_applied)
        if self._average is not None:
            self._average.load(dict(tensors["ema"]))
        self._scale.load(counters.loss_scale, counters.loss_scale_good_steps)
        self._rate_scale = counters.rate_scale
        self._updates_done = counters.updates_done

    def load_moments(self, tensors: Mapping[str, Mapping[str, Tensor]], updates_applied: int) -> None:
        """Take Adam's moments, and the updates that they come from."""
        for name, parameter in self.model.named_parameters():
            state = self._moments(parameter)
            state["step"].fill_(updates_applied)
            for moment in MOMENTS:
                state[moment].copy_(tensors[moment][name])

    @contextmanager
    def published(self) -> Iterator[None]:
        """Let the model hold the weights that are validated and published, for a while."""
        if self._average is None:
            yield
            return
        with self._average.in_place_of_weights():
            yield

    def _moments(self, parameter: nn.Parameter) -> dict[str, Any]:
        """Return Adam's state of a parameter; before the first update it is made as Adam makes it."""
        state: dict[str, Any] = self._optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            for moment in MOMENTS:
                state[moment] = torch.zeros_like(parameter)
        return state

    def _gradients(self, micro_batches: Sequence[Batch], target_tokens: int) -> tuple[Tensor, bool]:
        """Return the sums of loss and negative log-likelihood over this rank's share, divided by all target tokens, and
        whether memory was short; leave the gradient."""
        try:
            return self._accumulate(micro_batches, target_tokens), False
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
        halves = [half for batch in micro_batches for half in batch.halves()]
        try:
            return self._accumulate(halves, target_tokens), True
        except torch.OutOfMemoryError as error:
            shapes = ", ".join(f"{tuple(b.source_BS.shape)} to {tuple(b.decoder_input_BT.shape)}" for b in halves)
            text = (
                f"step {self._updates_done + 1}: batches of shape {shapes}, half of the recipe's, do not fit into the "
                "device's memory: lower optimization.batch_target_tokens or raise accumulation_steps"
            )
            raise TrainingFailed(FailureReason.OUT_OF_MEMORY, text) from error

    def _accumulate(self, micro_batches: Iterable[Batch], target_tokens: int) -> Tensor:
        self._optimizer.zero_grad()
        sums = torch.zeros(2, dtype=self.model.embedding.weight.dtype, device=self.ranks.device)
        for number, batch in enumerate(micro_batches):
            seed_dropout(self._seed, self._updates_done + 1, number, self.ranks.rank)
            with autocast(self._recipe.precision, self.ranks.device):
                loss, nll = self._losses(batch)
            loss, nll = loss / target_tokens, nll / target_tokens
            self._scale.apply(loss).backward()  # type: ignore[no-untyped-call]
            sums += torch.stack((loss.detach(), nll.detach()))
        return sums

    def _losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        recipe = self._recipe
        if not recipe.r_drop_alpha:
            return batch_losses(self.model, batch, recipe.label_smoothing, recipe.precision)
        twice = batch.repeated()
        hidden_2ND = _label_hidden(self.model, twice)
        return r_drop_loss(
            hidden_2ND,
            self.model.embedding.weight,
            batch.labels_N,
            recipe.label_smoothing,
            recipe.r_drop_alpha,
            DTYPES[recipe.precision],
        )


def new_trainee(model: Transformer, recipe: Recipe, ranks: Ranks) -> Trainee:
    """Return the model with an optimizer that has done nothing yet. Biases and norms are not decayed."""
    optimization = recipe.optimization
    parameters = list(model.parameters())
    optimizer = AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": optimization.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=learning_rate(recipe.schedule, 1),
        betas=(optimization.adam_beta1, optimization.adam_beta2),
        eps=optimization.adam_epsilon,
        fused=True,
    )
    return Trainee(model, recipe, ranks, optimizer)


def batch_losses(
    model: Transformer, batch: Batch, label_smoothing: float, precision: Precision = Precision.FP32
) -> tuple[Tensor, Tensor]:
    """Return the sums over the batch's target tokens of smoothed loss and negative log-likelihood."""
    hidden_ND = _label_hidden(model, batch)
    return smoothed_cross_entropy(hidden_ND, model.embedding.weight, batch.labels_N, label_smoothing, DTYPES[precision])


def clip_gradient(model: nn.Module, max_norm: float) -> Tensor:
    """Scale the gradient so that its global L2 norm is at most `max_norm` (0: leave it); return the norm before."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if max_norm > 0:
        nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
    return norm


def seed_dropout(seed: int, step: int, micro_batch: int, rank: int) -> None:
    """Make the random numbers of a micro-batch a function of these: a resumed run draws what an unbroken one does."""
    entropy = [seed, step, rank, micro_batch] if micro_batch else [seed, step, rank]
    torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]))


def _label_hidden(model: Transformer, batch: Batch) -> Tensor:
    """Return hidden_ND, what predicts the labels."""
    hidden_ND = model.hidden(batch.source_BS, batch.decoder_input_BT).flatten(0, 1)
    if len(hidden_ND) != batch.target_tokens:
        hidden_ND = hidden_ND.index_select(0, batch.label_positions_N)
    return hidden_ND
