"""The starts of workers."""

from __future__ import annotations

from typing import Final

from prometheus_client import CollectorRegistry

from ferryman_service.observability.definitions import counter

ATTEMPTS: Final = counter(
    "ferryman_launcher_attempts_total",
    "Workers that were to be started: `started`, or `failed_to_start` where the program could not be run at all.",
    ("outcome",),
)
FAILURES: Final = counter(
    "ferryman_supervisor_failures_total",
    "Looks of the supervisor at the runs that ended with an unexpected error. Training is not ready until one "
    "succeeds; the log says what is wrong.",
)
METRICS: Final = (ATTEMPTS, FAILURES)


class LaunchMetrics:
    """What application.ports.LaunchObserver asks for."""

    def __init__(self, registry: CollectorRegistry) -> None:
        attempts = ATTEMPTS.counter(registry)
        self._started, self._failed = (attempts.labels(outcome) for outcome in ("started", "failed_to_start"))
        self._failures = FAILURES.counter(registry)

    def started(self) -> None:
        """Take note of a worker that was started."""
        self._started.inc()

    def failed_to_start(self) -> None:
        """Take note of a worker that could not be started."""
        self._failed.inc()

    def failed_to_supervise(self) -> None:
        """Take note of a look at the runs that failed."""
        self._failures.inc()
