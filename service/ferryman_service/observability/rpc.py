"""Counters and times of calls, named as the gRPC ecosystem's dashboards expect them."""

from __future__ import annotations

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram

_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_METHOD: Final = ("grpc_service", "grpc_method", "grpc_type")
_UNKNOWN: Final = ("other", "other", "unary")


class RpcMetrics:
    """grpc_server_started_total, grpc_server_handled_total and grpc_server_handling_seconds."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._started = Counter("grpc_server_started_total", "Calls that began.", _METHOD, registry=registry)
        self._handled = Counter(
            "grpc_server_handled_total", "Calls that ended.", (*_METHOD, "grpc_code"), registry=registry
        )
        self._seconds = Histogram(
            "grpc_server_handling_seconds",
            "From a call's begin to its end.",
            _METHOD,
            buckets=_SECONDS,
            registry=registry,
        )

    def calls_of(self, service: str, method: str, kind: str) -> CallMetrics:
        """Return the metrics of one method. Only methods that exist may be named, or labels would grow without
        bound."""
        labels = (service, method, kind)
        return CallMetrics(self._started.labels(*labels), self._handled, self._seconds.labels(*labels), labels)

    def unknown_method(self) -> None:
        """Count a call of a method that does not exist, whatever its name, under "other"."""
        self._started.labels(*_UNKNOWN).inc()
        self._handled.labels(*_UNKNOWN, "UNIMPLEMENTED").inc()


class CallMetrics:
    """The metrics of one method."""

    def __init__(self, started: Counter, handled: Counter, seconds: Histogram, labels: tuple[str, str, str]) -> None:
        self._started = started
        self._handled = handled
        self._seconds = seconds
        self._labels = labels

    def started(self) -> None:
        """Count a call that begins."""
        self._started.inc()

    def handled(self, code: str, seconds: float) -> None:
        """Count a call that ended with a status code such as "OK"."""
        self._handled.labels(*self._labels, code).inc()
        self._seconds.observe(seconds)
