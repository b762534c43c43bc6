"""Adam over all parameters at once (Kingma and Ba, 2015), with decoupled weight decay (Loshchilov and Hutter, 2019).

The parameters of a model lie one behind the other in one tensor, and so do their gradients and moments: an update is a
few long operations, whatever the number of parameters, and ranks exchange one tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from ferryman_service.domain.recipe import OptimizationRecipe

MOMENTS: Final = ("exp_avg", "exp_avg_sq")

# In numbers. Matrix products want their operands aligned to 128 bytes.
_ALIGNMENT: Final = 32
# A norm in FP32 loses digits over millions of numbers: it is the norm of the norms of so many.
_NORM_ELEMENTS: Final = 2**16


class FlatTensors:
    """Where each parameter of a model lies in a flat tensor: those that are decayed first, then biases and norms."""

    def __init__(self, model: nn.Module) -> None:
        named = sorted(model.named_parameters(), key=lambda item: item[1].ndim <= 1)  # a stable sort
        assert len({(parameter.dtype, parameter.device) for _, parameter in named}) == 1, "parameters of two kinds"
        self.like = named[0][1].detach()
        self._slices: dict[str, tuple[int, torch.Size]] = {}
        self.decayed = self.size = 0
        for name, parameter in named:
            self._slices[name] = self.size, parameter.shape
            self.size += -(-parameter.numel() // _ALIGNMENT) * _ALIGNMENT
            if parameter.ndim > 1:
                self.decayed = self.size

    def new(self) -> Tensor:
        """Return a flat tensor of zeros."""
        return self.like.new_zeros(self.size)

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Return the parts of a flat tensor, by parameter name and in its shape."""
        return {name: flat[at : at + shape.numel()].view(shape) for name, (at, shape) in self._slices.items()}

    def halves(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Return what belongs to decayed parameters, and the rest."""
        return flat[: self.decayed], flat[self.decayed :]


class FlatAdam:
    """AdamW for a model whose parameters it moves into one tensor, where they stay.

    `weights` and `gradient` are flat. Backward passes add to the gradient.

    It calls the function behind torch's AdamW: the class loads the compiler, which costs a worker seconds and memory.
    """

    def __init__(self, model: nn.Module, recipe: OptimizationRecipe) -> None:
        self._recipe = recipe
        self._model = model
        self.layout = FlatTensors(model)
        self.weights, self.gradient = self.layout.new(), self.layout.new()
        self._move_in(model)
        self._moments = {name: self.layout.new() for name in MOMENTS}
        self._updates_applied = [torch.zeros((), device=self.weights.device) for _ in self.layout.halves(self.weights)]

    def zero_gradient(self) -> None:
        """Forget the gradient."""
        self.gradient.zero_()

    def step(self, rate: float, loss_scale: Tensor) -> tuple[Tensor, Tensor]:
        """Do an update with the gradient, which is that of the loss times `loss_scale`, and clip it.

        Returns the gradient's norm before clipping, and whether it is not finite: 0 or 1. If it is not, nothing is
        changed; the device finds that out by itself, and nobody waits for it.
        """
        first = next(iter(self._model.parameters()))
        assert first.untyped_storage().data_ptr() == self.weights.untyped_storage().data_ptr(), "the model was moved"
        norm = nn.utils.get_total_norm(torch.split(self.gradient, _NORM_ELEMENTS)) / loss_scale
        not_finite = torch.isfinite(norm).logical_not().to(torch.float32)
        divisor = loss_scale
        if self._recipe.clip_norm > 0:
            divisor = divisor * (norm / self._recipe.clip_norm).clamp(min=1.0)
        self._update(rate, divisor.to(torch.float32), not_finite)
        return norm, not_finite

    @torch.no_grad()
    def _update(self, rate: float, divisor: Tensor, not_finite: Tensor) -> None:
        """Divide the gradient and apply it; do nothing if `not_finite` is 1."""
        flat = (self.weights, self.gradient, *self._moments.values())
        parts = zip(*map(self.layout.halves, flat), strict=True)
        decays = (self._recipe.weight_decay, 0.0)
        for part, updates_applied, decay in zip(parts, self._updates_applied, decays, strict=True):
            weights, gradient, first_moment, second_moment = part
            adamw(
                [weights],
                [gradient],
                [first_moment],
                [second_moment],
                [],
                [updates_applied],
                fused=True,
                grad_scale=divisor,
                found_inf=not_finite,
                amsgrad=False,
                beta1=self._recipe.adam_beta1,
                beta2=self._recipe.adam_beta2,
                lr=rate,
                weight_decay=decay,
                eps=self._recipe.adam_epsilon,
                maximize=False,
            )

    @property
    def updates_applied(self) -> Tensor:
        """How many updates changed the weights, on the device."""
        return self._updates_applied[0]

    def moments(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Return both moments with their parts by parameter name; not copies."""
        for name, flat in self._moments.items():
            yield name, self.layout.views(flat)

    def load_moments(self, tensors: Mapping[str, Mapping[str, Tensor]], updates_applied: int) -> None:
        """Take what `moments` returned, and the updates that they come from."""
        for moment, parts in self.moments():
            for name, part in parts.items():
                part.copy_(tensors[moment][name])
        for applied in self._updates_applied:
            applied.fill_(updates_applied)

    @torch.no_grad()
    def _move_in(self, model: nn.Module) -> None:
        weights, gradients = self.layout.views(self.weights), self.layout.views(self.gradient)
        for name, parameter in model.named_parameters():
            weights[name].copy_(parameter)
            parameter.data = weights[name]
            parameter.grad = gradients[name]
