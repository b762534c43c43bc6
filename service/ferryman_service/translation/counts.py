"""What all engines of a process have done, and hold: kept here so that it outlives each of them."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final, Protocol

from ferryman_service.translation.cache_memory import CacheMemory

ROW_BOUNDS: Final = (1, 2, 5, 10, 20, 40, 80, 160, 320, 640, 1280)
"""Steps are counted by how many rows they have at most."""


class Watched(Protocol):
    """An engine, as far as it is asked what it holds. Safe to call from every thread."""

    def cache_bytes(self) -> int:
        """Return how much memory the caches take."""
        ...

    def waiting(self) -> Mapping[str, int]:
        """Return how many sentences wait, by size."""
        ...


class EngineCounts:
    """Safe to use from every thread. A step takes a third of a µs here. `memory` is what all engines' caches share."""

    def __init__(self, memory: CacheMemory | None = None) -> None:
        """Store the limit of the caches' memory; None: there is no limit."""
        self.memory = memory or CacheMemory()
        self._lock = threading.Lock()
        self._steps_by_rows = [0] * (len(ROW_BOUNDS) + 1)
        self._rows = 0
        self._engines: set[Watched] = set()

    def step(self, rows: int) -> None:
        """Count a decoding step of so many rows."""
        place = bisect_left(ROW_BOUNDS, rows)
        with self._lock:
            self._steps_by_rows[place] += 1
            self._rows += rows

    def watch(self, engine: Watched) -> None:
        """Take account of what an engine holds; it is asked from other threads."""
        with self._lock:
            self._engines.add(engine)

    def unwatch(self, engine: Watched) -> None:
        """Forget an engine, which is closed."""
        with self._lock:
            self._engines.discard(engine)

    def steps_by_rows(self) -> tuple[Sequence[int], int]:
        """Return how many steps had at most so many rows, for each bound and behind the last, none counted twice; and
        the sum of all their rows."""
        with self._lock:
            return tuple(self._steps_by_rows), self._rows

    def cache_bytes(self) -> int:
        """Return how much memory the caches of all engines take."""
        return sum(engine.cache_bytes() for engine in self._watched())

    def waiting(self) -> Mapping[str, int]:
        """Return how many sentences wait in all engines, by size; a size that no engine has named is left out."""
        waiting: Counter[str] = Counter()
        for engine in self._watched():
            waiting.update(engine.waiting())
        return waiting

    def booked_bytes(self) -> int:
        """Return how much memory is booked for caches."""
        return self.memory.booked_bytes

    def limit_bytes(self) -> int:
        """Return how much memory may be booked; 0 without a limit."""
        return self.memory.limit_bytes

    def _watched(self) -> tuple[Watched, ...]:
        with self._lock:
            return tuple(self._engines)
