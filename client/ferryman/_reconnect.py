"""When a broken stream is taken up again, and for how long that is tried."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Final

from ferryman.errors import Unavailable

_FIRST_PAUSE_S: Final = 0.1
_LONGEST_PAUSE_S: Final = 5.0


class Reconnection:
    """The state of one stream's reconnecting, for both clients: they make the calls and the pauses, this decides."""

    def __init__(self, timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Store. `timeout_s` bounds the time without any word from the server; `clock` tells seconds."""
        self._timeout_s = timeout_s
        self._clock = clock
        self._broken_since_s: float | None = None
        self._pause_s = _FIRST_PAUSE_S

    def sign_of_life(self) -> None:
        """Note that the server has said something."""
        self._broken_since_s = None
        self._pause_s = _FIRST_PAUSE_S

    def accepted(self) -> None:
        """Note that the server had accepted the call that has broken, though it may have had nothing to say in it.

        Pauses grow on until it says something: a sentence that every server dies of shall not kill them in a row.
        """
        self._broken_since_s = None

    def pause_s(self, error: Unavailable) -> float:
        """Return how long to wait before the next call; raise `error` if the server has been silent for too long."""
        now_s = self._clock()
        if self._broken_since_s is None:
            self._broken_since_s = now_s
        if now_s - self._broken_since_s >= self._timeout_s:
            raise error
        pause_s = self._pause_s
        self._pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        # Spread, so that the watchers of a server that comes back do not all knock at once.
        return pause_s * random.uniform(0.5, 1.0)  # noqa: S311 (no secret)
