"""The time that a run may take."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable
from typing import Final

_FIRST_RESERVE: Final = 0.05
_RECENT_UPDATES: Final = 100


class TimeBudget:
    """The seconds that a run may take, and what its updates and its validations take of them.

    `limit_s` 0 is no limit. `validation_s` and `update_s()` are None until one was measured.
    """

    def __init__(self, limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Start the time."""
        self.clock = clock
        self.limit_s = limit_s
        self._started_s = clock()
        self.validation_s: float | None = None
        self._updates_s: deque[float] = deque(maxlen=_RECENT_UPDATES)

    def resume(self, elapsed_s: float, validation_s: float | None, update_s: float | None) -> None:
        """Count what earlier attempts spent, and what they measured."""
        self._started_s -= elapsed_s
        self.validation_s = validation_s
        if update_s is not None:
            self._updates_s.extend([update_s] * _RECENT_UPDATES)

    def elapsed_s(self) -> float:
        """Return the seconds spent, by earlier attempts too."""
        return self.clock() - self._started_s

    def note_update(self, seconds: float) -> None:
        """Take account of an update's wall time."""
        self._updates_s.append(seconds)

    def update_s(self) -> float | None:
        """Return the mean wall time of the last updates without the slowest tenth of them: the first update of a
        process, or one that had to wait, says nothing about those to come."""
        if not self._updates_s:
            return None
        ordered = sorted(self._updates_s)
        return statistics.fmean(ordered[: max(1, len(ordered) * 9 // 10)])

    def left_s(self, validations_to_come: int) -> float:
        """Return the seconds left for updates if this many validations are still to come; infinite without a limit."""
        if self.limit_s == 0:
            return math.inf
        reserve_s = self.limit_s * _FIRST_RESERVE
        if self.validation_s is not None:
            reserve_s = validations_to_come * self.validation_s
        return self.limit_s - self.elapsed_s() - reserve_s

    def is_spent(self, validations_to_come: int) -> bool:
        """Whether it is time to stop, so that this many validations still fit."""
        return self.left_s(validations_to_come) <= 0
