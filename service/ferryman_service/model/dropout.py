"""Dropout (Srivastava et al., 2014) with random numbers that do not hold up a CPU.

PyTorch draws a Bernoulli variable for each number, on one thread, which takes a fifth of a small model's step
(docs/lab-log.md). Here NumPy draws 16 random bits for each number and compares them.
On a GPU it is PyTorch's own.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LEVELS: Final = 2**16
_MAX_SEED: Final = 2**63 - 1


class Dropout(nn.Module):
    """In training each number becomes 0 with probability p, to 1/65536, and the others are scaled by 1 / (1 - p)."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Return numbers of the same shape. What is dropped is a function of torch's generator."""
        if not self.training or self.p == 0.0:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.p)
        dropped: Tensor = _MaskedScale.apply(x, self.p)  # type: ignore[no-untyped-call]
        return dropped

    def extra_repr(self) -> str:
        """Return the probability, for people."""
        return f"p={self.p:g}"


class _MaskedScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:  # noqa: ANN401 (torch's context has no public type)
        count, threshold = x.numel(), round(p * _LEVELS)
        generator = np.random.Generator(np.random.SFC64(int(torch.randint(_MAX_SEED, ()))))
        bits = generator.integers(0, 2**64, -(-count // 4), dtype=np.uint64).view(np.uint16)[:count]
        scale = np.float32(_LEVELS / (_LEVELS - threshold)) if threshold < _LEVELS else np.float32(0)
        mask = torch.from_numpy(np.multiply(bits >= threshold, scale, dtype=np.float32)).view(x.shape).to(x.dtype)
        ctx.save_for_backward(mask)
        return x * mask

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        (mask,) = ctx.saved_tensors
        return grad * mask, None
