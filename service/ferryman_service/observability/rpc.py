"""Counters and times of calls, named as the gRPC ecosystem's dashboards expect them."""

from __future__ import annotations

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram

from ferryman_service.observability.definitions import Metric, counter, gauge, histogram

_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_METHOD: Final = ("grpc_service", "grpc_method", "grpc_type")
_UNKNOWN: Final = ("other", "other", "unary")

STARTED: Final = counter("grpc_server_started_total", "Calls started.", _METHOD)
HANDLED: Final = counter("grpc_server_handled_total", "Calls ended, by status code.", (*_METHOD, "grpc_code"))
SECONDS: Final = histogram("grpc_server_handling_seconds", "Duration of a call.", _SECONDS, _METHOD)
RECEIVED: Final = counter("grpc_server_msg_received_total", "Messages received from callers.", _METHOD)
SENT: Final = counter("grpc_server_msg_sent_total", "Messages sent to callers.", _METHOD)
IN_FLIGHT: Final = gauge("ferryman_calls_in_flight", "Calls in flight, by kind.", ("call_kind",))
REFUSED: Final = counter(
    "ferryman_calls_refused_total", "Calls that a request limit has refused or ended, by limit.", ("limit",)
)
INCOMPLETE: Final = gauge(
    "ferryman_incomplete_messages",
    "Partly received messages, one for each request stream. Each reserves memory for the largest message.",
)
METRICS: Final[tuple[Metric, ...]] = (STARTED, HANDLED, SECONDS, RECEIVED, SENT, IN_FLIGHT, REFUSED, INCOMPLETE)


LIMITS: Final = (
    *("calls", "streams", "transfers", "health_calls", "health_watches"),
    *("open_files", "message_memory", "silence"),
)
"""What may refuse or end a call; each is exported from the start."""


class RpcMetrics:
    """What is counted of every call; belongs to one event loop."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._started = STARTED.counter(registry)
        self._handled = HANDLED.counter(registry)
        self._seconds = SECONDS.histogram(registry)
        self._received = RECEIVED.counter(registry)
        self._sent = SENT.counter(registry)
        self._in_flight = IN_FLIGHT.gauge(registry)
        self._refused = REFUSED.counter(registry)
        for limit in LIMITS:
            self._refused.labels(limit)
        self._incomplete = INCOMPLETE.gauge(registry)
        self._calls: dict[tuple[str, str, str], CallMetrics] = {}

    def calls_of(self, service: str, method: str, kind: str) -> CallMetrics:
        """Return the metrics of one method. Only methods that exist may be named, or labels would grow without
        bound."""
        labels = service, method, kind
        found = self._calls.get(labels)
        if found is None:
            found = self._calls[labels] = CallMetrics(
                started=self._started.labels(*labels),
                handled=self._handled,
                seconds=self._seconds.labels(*labels),
                received=self._received.labels(*labels),
                sent=self._sent.labels(*labels),
                labels=labels,
            )
        return found

    def unknown_method(self) -> None:
        """Count a call of a method that does not exist, whatever its name, under "other"."""
        self._started.labels(*_UNKNOWN).inc()
        self._handled.labels(*_UNKNOWN, "UNIMPLEMENTED").inc()

    def in_flight(self, kind: str, change: int) -> None:
        """Count calls of a kind that begin, or, with a negative change, end."""
        self._in_flight.labels(kind).inc(change)

    def refused(self, limit: str) -> None:
        """Count a call that a limit has refused or ended."""
        self._refused.labels(limit).inc()

    def incomplete_messages(self, change: int) -> None:
        """Count messages that begin to be received, or, with a negative change, no longer are."""
        self._incomplete.inc(change)


class CallMetrics:
    """The metrics of one method."""

    def __init__(
        self,
        *,
        started: Counter,
        handled: Counter,
        seconds: Histogram,
        received: Counter,
        sent: Counter,
        labels: tuple[str, str, str],
    ) -> None:
        self._started = started
        self._handled = handled
        self._seconds = seconds
        self._received = received
        self._sent = sent
        self._labels = labels

    def started(self) -> None:
        """Count a call that begins."""
        self._started.inc()

    def received(self) -> None:
        """Count a message of the caller's."""
        self._received.inc()

    def sent(self) -> None:
        """Count a message to the caller."""
        self._sent.inc()

    def handled(self, code: str, seconds: float) -> None:
        """Count a call that ended with a status code such as "OK"."""
        self._handled.labels(*self._labels, code).inc()
        self._seconds.observe(seconds)
