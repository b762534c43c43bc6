"""A moving average of the weights (Polyak and Juditsky, 1992)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class MovingAverage:
    """average <- average + (1 - d) (weights - average) after each update that was applied, in FP32.

    d is the decay, or (1 + n) / (10 + n) after n updates if that is less: the first weights are soon forgotten.
    """

    def __init__(self, weights: Tensor, decay: float) -> None:
        self._weights = weights
        self._decay = decay
        self.average = weights.clone()

    @torch.no_grad()
    def update(self, updates_applied: Tensor, not_finite: Tensor) -> None:
        """Follow the weights, after so many updates; if `not_finite` is 1, the last one was not applied.

        Both are on the device, and so is the decision.
        """
        decay = ((1 + updates_applied) / (10 + updates_applied)).clamp(max=self._decay)
        self.average.lerp_(self._weights, ((1 - decay) * (1 - not_finite)).to(self.average.dtype))

    @contextmanager
    @torch.no_grad()
    def in_place_of_weights(self) -> Iterator[None]:
        """Let the model hold the average for a while; then it holds its weights again, to the last bit."""
        kept = self._weights.clone()
        self._weights.copy_(self.average)
        try:
            yield
        finally:
            self._weights.copy_(kept)
