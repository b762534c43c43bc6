"""A moving average of the weights (Polyak and Juditsky, 1992)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class MovingAverage:
    """average <- average + (1 - d) (weights - average) after each update, in FP32.

    d is the decay, or (1 + n) / (10 + n) after n updates if that is less: the first weights are soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._model = model
        self._decay = decay
        self.tensors = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    @torch.no_grad()
    def update(self, updates_done: int) -> None:
        """Follow the weights, after so many updates."""
        decay = min(self._decay, (1 + updates_done) / (10 + updates_done))
        weights = [parameter.detach() for parameter in self._model.parameters()]
        torch._foreach_lerp_(list(self.tensors.values()), weights, 1.0 - decay)

    @contextmanager
    @torch.no_grad()
    def in_place_of_weights(self) -> Iterator[None]:
        """Let the model hold the average for a while; then it holds its weights again, to the last bit."""
        kept = {name: parameter.detach().clone() for name, parameter in self._model.named_parameters()}
        self._copy(self.tensors)
        try:
            yield
        finally:
            self._copy(kept)

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take the average back."""
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])

    def _copy(self, tensors: dict[str, Tensor]) -> None:
        for name, parameter in self._model.named_parameters():
            parameter.copy_(tensors[name])
