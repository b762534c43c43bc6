"""The starts of workers."""

from __future__ import annotations

from typing import Final

from prometheus_client import CollectorRegistry

from ferryman_service.observability.definitions import counter

ATTEMPTS: Final = counter(
    "ferryman_launcher_attempts_total",
    "Attempts to start a worker. `failed_to_start`: the program could not be executed.",
    ("outcome",),
)
FAILURES: Final = counter(
    "ferryman_supervisor_failures_total",
    "Unexpected errors of the supervisor of runs. TrainingService is NOT_SERVING until the supervisor succeeds again. "
    "The log has the error.",
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
