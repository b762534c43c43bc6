"""Mixed precision (Micikevicius et al., 2018): products in 16 bits, weights, moments and sums in 32."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Final

import torch
from torch import Tensor

from ferryman_service.domain.recipe import Precision

DTYPES: Final = {Precision.FP32: torch.float32, Precision.BF16: torch.bfloat16, Precision.FP16: torch.float16}

_FIRST_SCALE: Final = 2.0**16
_GROWTH: Final = 2.0
_BACKOFF: Final = 0.5
_GROWTH_INTERVAL: Final = 2000


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Return the context in which matrix products are computed in the precision."""
    return torch.autocast(device.type, DTYPES[precision], enabled=precision is not Precision.FP32)


class LossScale:
    """Keeps the gradients of FP16 within its range; for the other precisions the scale is 1 for ever.

    The scale, `value`, doubles after 2,000 finite gradients in a row and halves with each that is not. It lives on the
    device, so that nobody waits for it.
    """

    def __init__(self, precision: Precision, device: torch.device) -> None:
        self._adapts = precision is Precision.FP16
        self.value = torch.tensor(_FIRST_SCALE if self._adapts else 1.0, device=device)
        self._good_steps = torch.tensor(0, dtype=torch.int32, device=device)

    def apply(self, loss: Tensor) -> Tensor:
        """Return the loss whose gradient is computed."""
        return loss * self.value if self._adapts else loss

    def update(self, not_finite: Tensor) -> None:
        """Adapt to whether the gradient was finite: 0 or 1, on the device."""
        if self._adapts:
            torch._amp_update_scale_(self.value, self._good_steps, not_finite, _GROWTH, _BACKOFF, _GROWTH_INTERVAL)

    def state(self) -> tuple[float, int]:
        """Return scale and finite gradients since it last changed."""
        return float(self.value), int(self._good_steps)

    def load(self, scale: float, good_steps: int) -> None:
        """Take the state back."""
        self.value.fill_(scale)
        self._good_steps.fill_(good_steps)
