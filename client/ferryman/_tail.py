"""Where a reader of a run's metrics stands, and when a broken stream is taken up again."""

from __future__ import annotations

import time
from collections.abc import Callable

from ferryman._checks import checked_reconnect_timeout_s
from ferryman._convert import Call, stream_metrics
from ferryman._reconnect import Reconnection
from ferryman.errors import Unavailable
from ferryman.types import Heartbeat, MetricRecord


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
        """Store. `reconnect_timeout_s` bounds the time without any word from the server; `clock` tells seconds.

        Raises InvalidRequest for what is no time.
        """
        self._run_id = run_id
        self._last_sequence = after_sequence
        self._follow = follow
        self._reconnection = Reconnection(checked_reconnect_timeout_s(reconnect_timeout_s), clock)

    def call(self) -> Call[MetricRecord | Heartbeat]:
        """Return the call that goes on where the last one broke off."""
        return stream_metrics(self._run_id, self._last_sequence, not self._follow)

    def accept(self, item: MetricRecord | Heartbeat) -> bool:
        """Note a sign of life; tell whether it is news (a record that was seen before is not)."""
        self._reconnection.sign_of_life()
        if isinstance(item, Heartbeat):
            return True
        is_news = item.sequence > self._last_sequence
        self._last_sequence = max(self._last_sequence, item.sequence)
        return is_news

    def pause_s(self, error: Unavailable) -> float:
        """Return how long to wait before the next call; raise `error` if the server has been silent for too long."""
        return self._reconnection.pause_s(error)
