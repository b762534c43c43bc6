"""Sinusoidal positions (Vaswani et al., 2017, section 3.5) and rotations by them (Su et al., 2021, section 3.4).

Shape suffixes: T positions, D model width; E head width, P = E / 2 pairs.
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
            with torch.inference_mode(False):  # training needs the table after a validation that made it grow
                grown = sinusoids(2 * (first + length), self._d_model)
                self.table_TD = table_TD = grown.to(device=table_TD.device, dtype=table_TD.dtype)
        return table_TD[first : first + length]


def rotate(x_BHTE: Tensor, sinusoids_TE: Tensor) -> Tensor:
    """Return x_BHTE with each pair of columns (2i, 2i + 1) turned by the angle whose sine and cosine stand there."""
    sine_TP, cosine_TP = sinusoids_TE.unflatten(-1, (-1, 2)).unbind(-1)  # type: ignore[no-untyped-call]
    even_BHTP, odd_BHTP = x_BHTE.unflatten(-1, (-1, 2)).unbind(-1)  # type: ignore[no-untyped-call]
    turned = (even_BHTP * cosine_TP - odd_BHTP * sine_TP, even_BHTP * sine_TP + odd_BHTP * cosine_TP)
    return torch.stack(turned, dim=-1).flatten(-2)
