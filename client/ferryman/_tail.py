"""Where a reader of a run's metrics stands, and when a broken stream is taken up again."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Final

from ferryman._convert import Call, stream_metrics
from ferryman.errors import Unavailable
from ferryman.types import Heartbeat, MetricRecord

_FIRST_PAUSE_S: Final = 0.1
_LONGEST_PAUSE_S: Final = 5.0


class MetricsTail:
    """The state of one `stream_metrics`, shared by both clients: they make the calls and the pauses, this decides."""

    def __init__(
        self,
        run_id: str,
        after_sequence: int,
        *,
        follow: bool,
        reconnect_timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Store. `reconnect_timeout_s` bounds the time without any word from the server; `clock` tells seconds."""
        self._run_id = run_id
        self._last_sequence = after_sequence
        self._follow = follow
        self._reconnect_timeout_s = reconnect_timeout_s
        self._clock = clock
        self._broken_since_s: float | None = None
        self._pause_s = _FIRST_PAUSE_S

    def call(self) -> Call[MetricRecord | Heartbeat]:
        """Return the call that goes on where the last one broke off."""
        return stream_metrics(self._run_id, self._last_sequence, not self._follow)

    def accept(self, item: MetricRecord | Heartbeat) -> bool:
        """Note a sign of life; tell whether it is news (a record that was seen before is not)."""
        self._broken_since_s = None
        self._pause_s = _FIRST_PAUSE_S
        if isinstance(item, Heartbeat):
            return True
        is_news = item.sequence > self._last_sequence
        self._last_sequence = max(self._last_sequence, item.sequence)
        return is_news

    def pause_s(self, error: Unavailable) -> float:
        """Return how long to wait before the next call; raise `error` if the server has been silent for too long."""
        now_s = self._clock()
        if self._broken_since_s is None:
            self._broken_since_s = now_s
        if now_s - self._broken_since_s >= self._reconnect_timeout_s:
            raise error
        pause_s = self._pause_s
        self._pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        # Spread, so that the watchers of a server that comes back do not all knock at once.
        return pause_s * random.uniform(0.5, 1.0)  # noqa: S311 (no secret)
