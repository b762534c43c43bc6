"""The position of a client in a run's metrics, across reconnects."""

from __future__ import annotations

import time
from collections.abc import Callable

from ferryman._checks import checked_reconnect_timeout_s
from ferryman._convert import Call, stream_metrics
from ferryman._reconnect import ReconnectBackoff
from ferryman.errors import Unavailable
from ferryman.types import Heartbeat, MetricRecord


class MetricsTail:
    """The state of one `stream_metrics`. Both clients make the calls and sleep; this class says where and when."""

    def __init__(
        self,
        run_id: str,
        after_sequence: int,
        *,
        follow: bool,
        reconnect_timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Give up once no call has reached the server for `reconnect_timeout_s`; `clock` returns seconds.

        Raises InvalidRequest if `reconnect_timeout_s` is negative or not a number.
        """
        self._run_id = run_id
        self._last_sequence = after_sequence
        self._follow = follow
        self._backoff = ReconnectBackoff(checked_reconnect_timeout_s(reconnect_timeout_s), clock)

    def call(self) -> Call[MetricRecord | Heartbeat]:
        """Return the call that resumes after the last record."""
        return stream_metrics(self._run_id, self._last_sequence, not self._follow)

    def accept(self, item: MetricRecord | Heartbeat) -> bool:
        """Record a response; return whether the caller should see it, which is False for a repeated record."""
        self._backoff.reset()
        if isinstance(item, Heartbeat):
            return True
        is_new = item.sequence > self._last_sequence
        self._last_sequence = max(self._last_sequence, item.sequence)
        return is_new

    def next_delay_s(self, error: Unavailable) -> float:
        """Return the delay before the next call. Raises `error` once the reconnect timeout has passed."""
        return self._backoff.next_delay_s(error)
