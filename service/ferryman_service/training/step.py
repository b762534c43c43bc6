"""One update of the weights (Vaswani et al., 2017, sections 5.3 and 5.4).

Shape suffixes: B sentences, T target positions, N target tokens without padding, D model width.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ferryman_service.domain.recipe import Precision, Recipe
from ferryman_service.domain.runs import FailureReason, TrainingFailed
from ferryman_service.domain.schedule import DecayPlan, learning_rate
from ferryman_service.model.transformer import Transformer
from ferryman_service.training.batches import Batch
from ferryman_service.training.compile import reason_of, stop_compiling
from ferryman_service.training.ema import MovingAverage
from ferryman_service.training.loss import r_drop_loss, smoothed_cross_entropy
from ferryman_service.training.optimizer import FlatAdam
from ferryman_service.training.precision import DTYPES, LossScale, autocast
from ferryman_service.training.ranks import Ranks

_log = logging.getLogger(__name__)


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
    `uncompiled`: why compiled code failed; this update and all after it do without.
    """

    loss: float
    nll_per_token: float
    gradient_norm: float
    learning_rate: float
    skipped: bool = False
    split: bool = False
    uncompiled: str = ""


class PendingOutcome:
    """The outcome of an update that a GPU may still be computing. Its numbers are on their way to the CPU."""

    def __init__(self, numbers: Tensor, learning_rate: float, *, split: bool, uncompiled: str = "") -> None:
        self._learning_rate = learning_rate
        self._split = split
        self._uncompiled = uncompiled
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
            uncompiled=self._uncompiled,
        )


class Trainee:
    """What is trained: a model, its optimizer, and what an update needs. Make one with `new_trainee`.

    `compiled`: the model runs compiled code, which may fail where the model as it is would not. `decays` are the
    planned decays of the learning rate, which the training loop sets.
    """

    def __init__(
        self, model: Transformer, recipe: Recipe, ranks: Ranks, optimizer: FlatAdam, *, compiled: bool
    ) -> None:
        self.model = model
        self.ranks = ranks
        self._seed = recipe.seed
        self._recipe = recipe.optimization
        self._schedule = recipe.schedule
        self._optimizer = optimizer
        self._compiled = compiled
        self._scale = LossScale(self._recipe.precision, ranks.device)
        self._average = MovingAverage(optimizer.weights, self._recipe.ema_decay) if self._recipe.ema_decay else None
        self.decays: Sequence[DecayPlan] = ()
        self._rate_scale = 1.0
        self._updates_done = 0

    def step(self, micro_batches: Sequence[Batch], target_tokens: int) -> PendingOutcome:
        """Do one update with this rank's micro-batches (none: it has no share in this one).

        `target_tokens` counts those of all ranks: the loss, and so the gradient, is the mean over them. An update whose
        gradient is not finite is skipped on the device, without anybody waiting for the news.
        Raises TrainingFailed (OUT_OF_MEMORY).
        """
        sums, split, uncompiled = self._compiled_or_not(micro_batches, target_tokens)
        self.ranks.sum(self._optimizer.gradient, sums)
        rate = self._rate_scale * learning_rate(self._schedule, self._updates_done + 1, self.decays)
        norm, not_finite = self._optimizer.step(rate, self._scale.value)
        self._scale.update(not_finite)
        self._updates_done += 1
        if self._average is not None:
            self._average.update(self._optimizer.updates_applied, not_finite)
        numbers = torch.cat((sums, norm.to(sums.dtype).view(1)))
        return PendingOutcome(numbers, rate, split=split, uncompiled=uncompiled)

    def scale_rate(self, factor: float) -> None:
        """Multiply the learning rate from now on."""
        self._rate_scale *= factor

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return, by group and parameter name, all tensors that the next updates depend on; not copies."""
        layout = self._optimizer.layout
        groups = {"weights": layout.views(self._optimizer.weights), **dict(self._optimizer.moments())}
        if self._average is not None:
            groups["ema"] = layout.views(self._average.average)
        return groups

    def counters(self) -> TraineeCounters:
        """Return what the next updates depend on beside tensors."""
        scale, good_steps = self._scale.state()
        return TraineeCounters(
            updates_done=self._updates_done,
            updates_applied=int(self._optimizer.updates_applied),
            rate_scale=self._rate_scale,
            loss_scale=scale,
            loss_scale_good_steps=good_steps,
        )

    def load(self, tensors: Mapping[str, Mapping[str, Tensor]], counters: TraineeCounters) -> None:
        """Take back what `tensors` and `counters` returned."""
        self.load_moments(tensors, counters.updates_applied)
        for group in self.tensors().keys() & {"weights", "ema"}:
            for name, tensor in self.tensors()[group].items():
                tensor.copy_(tensors[group][name])
        self._scale.load(counters.loss_scale, counters.loss_scale_good_steps)
        self._rate_scale = counters.rate_scale
        self._updates_done = counters.updates_done

    def load_moments(self, tensors: Mapping[str, Mapping[str, Tensor]], updates_applied: int) -> None:
        """Take Adam's moments, and the updates that they come from."""
        self._optimizer.load_moments(tensors, updates_applied)

    @contextmanager
    def published(self) -> Iterator[None]:
        """Let the model hold the weights that are validated and published, for a while."""
        with nullcontext() if self._average is None else self._average.in_place_of_weights():
            yield

    def _compiled_or_not(self, micro_batches: Sequence[Batch], target_tokens: int) -> tuple[Tensor, bool, str]:
        """Return what `_gradients` does, and why compiled code failed; then all of it is done again without.

        That this update's dropout is drawn anew from its seed makes the second time as good as the first.
        """
        try:
            return *self._gradients(micro_batches, target_tokens), ""
        except TrainingFailed:
            raise
        except Exception as error:  # whatever compilers raise; what is no fault of theirs is raised again below
            if not self._compiled:
                raise
            _log.warning("compiled code failed, going on without", exc_info=True)
            reason = reason_of(error)
        stop_compiling()
        self._compiled = False
        return *self._gradients(micro_batches, target_tokens), reason

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
        self._optimizer.zero_gradient()
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


def new_trainee(model: Transformer, recipe: Recipe, ranks: Ranks, *, compiled: bool = False) -> Trainee:
    """Return the model, whose layers may be `compiled`, with an optimizer that has done nothing yet.

    The model is on the ranks' device and stays there: its parameters now lie in one tensor.
    """
    return Trainee(model, recipe, ranks, FlatAdam(model, recipe.optimization), compiled=compiled)


def batch_losses(
    model: Transformer, batch: Batch, label_smoothing: float, precision: Precision = Precision.FP32
) -> tuple[Tensor, Tensor]:
    """Return the sums over the batch's target tokens of smoothed loss and negative log-likelihood."""
    hidden_ND = _label_hidden(model, batch)
    return smoothed_cross_entropy(hidden_ND, model.embedding.weight, batch.labels_N, label_smoothing, DTYPES[precision])


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
