"""Whether a program's work is alive, as far as the program itself can tell."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager


class Heartbeat:
    """Says whether the main thread is alive, to another thread that asks now and then.

    It is, unless it waits for somebody else and the wait does not end: for another process, which may be stopped, or
    for a device. A long computation of its own is alive however long it takes.
    """

    def __init__(self) -> None:
        """Begin outside of any wait."""
        self._numbers = itertools.count(1)
        self._wait = 0
        self._wait_seen = 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """To be put around a wait of the main thread for somebody else."""
        self._wait = next(self._numbers)
        try:
            yield
        finally:
            self._wait = 0

    def is_alive(self) -> bool:
        """Tell whether the main thread is in no wait, or in another one than at the last call."""
        seen, self._wait_seen = self._wait_seen, self._wait
        return self._wait_seen == 0 or self._wait_seen != seen
