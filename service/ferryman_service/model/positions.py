"""Sinusoidal positions (Vaswani et al., 2017, section 3.5).

Shape suffixes: T positions, D model width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

_FIRST_TABLE_LENGTH = 512


def sinusoids(length: int, d_model: int) -> Tensor:
    """Return positions_TD: sin(t / 10000^(2i/d_model)) in column 2i, the cosine of the same angle in column 2i + 1."""
    position_T = torch.arange(length, dtype=torch.float64)
    frequency = torch.exp(torch.arange(0, d_model, 2, dtype=torch.float64) * (-math.log(10_000.0) / d_model))
    angle = position_T[:, None] * frequency
    return torch.stack((angle.sin(), angle.cos()), dim=-1).reshape(length, d_model).float()


class SinusoidalPositions(nn.Module):
    """A table of positions that grows when a longer sentence comes. It is computed, so it is not in the state dict."""

    table_TD: Tensor

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self._d_model = d_model
        self.register_buffer("table_TD", sinusoids(_FIRST_TABLE_LENGTH, d_model), persistent=False)

    def forward(self, first: int, length: int) -> Tensor:
        """Return positions_TD of `length` positions from `first`."""
        table_TD = self.table_TD
        if first + length > table_TD.shape[0]:
            grown = sinusoids(2 * (first + length), self._d_model)
            self.table_TD = table_TD = grown.to(device=table_TD.device, dtype=table_TD.dtype)
        return table_TD[first : first + length]
