"""The time that a run may take."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

_FIRST_RESERVE: Final = 0.05


class TimeBudget:
    """The seconds that a run may take, and what its last work is expected to need of them."""

    def __init__(self, limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Start the time; a limit of 0 is none."""
        self.clock = clock
        self._limit_s = limit_s
        self._started_s = clock()
        self.validation_s: float | None = None

    def resume(self, elapsed_s: float, validation_s: float | None) -> None:
        """Count what earlier attempts spent, and what they learnt about validations."""
        self._started_s -= elapsed_s
        self.validation_s = validation_s

    def elapsed_s(self) -> float:
        """Return the seconds spent, by earlier attempts too."""
        return self.clock() - self._started_s

    def is_spent(self, validations_to_come: int) -> bool:
        """Whether it is time to stop, so that this many validations still fit."""
        if self._limit_s == 0:
            return False
        reserve_s = self._limit_s * _FIRST_RESERVE
        if self.validation_s is not None:
            reserve_s = validations_to_come * self.validation_s
        return self.elapsed_s() + reserve_s >= self._limit_s
