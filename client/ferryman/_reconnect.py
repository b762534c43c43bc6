"""Exponential backoff with jitter for streams that reconnect."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Final

from ferryman.errors import Unavailable

_FIRST_DELAY_S: Final = 0.1
_LONGEST_DELAY_S: Final = 5.0


class ReconnectBackoff:
    """The delays between the calls of one stream, and when to give up. Both clients make the calls and sleep."""

    def __init__(self, timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Give up once no call has reached the server for `timeout_s`; `clock` returns seconds."""
        self._timeout_s = timeout_s
        self._clock = clock
        self._broken_since_s: float | None = None
        self._delay_s = _FIRST_DELAY_S

    def reset(self) -> None:
        """Start over, because the server has sent a response."""
        self._broken_since_s = None
        self._delay_s = _FIRST_DELAY_S

    def call_accepted(self) -> None:
        """Restart the timeout, because the server accepted the call that broke, perhaps without a response.

        Delays keep growing until a response arrives: a sentence that crashes a server must not crash all in a row.
        """
        self._broken_since_s = None

    def next_delay_s(self, error: Unavailable) -> float:
        """Return the delay before the next call. Raises `error` once the timeout has passed."""
        now_s = self._clock()
        if self._broken_since_s is None:
            self._broken_since_s = now_s
        if now_s - self._broken_since_s >= self._timeout_s:
            raise error
        delay_s = self._delay_s
        self._delay_s = min(2 * delay_s, _LONGEST_DELAY_S)
        # Jitter, so that the clients of a restarted server do not all reconnect at once.
        return delay_s * random.uniform(0.5, 1.0)  # noqa: S311 (no secret)
