"""The database, as this process finds it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from prometheus_client import CollectorRegistry

from ferryman_service.observability.definitions import counter, gauge, histogram

_LAG_SECONDS: Final = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 600)

LAG_SECONDS: Final = histogram(
    "ferryman_store_lag_seconds",
    "Delay from a training step in the worker until this process reads it from the database. Observed once a second, "
    "for the newest step of each active run.",
    _LAG_SECONDS,
)
ERRORS: Final = counter(
    "ferryman_store_errors_total", "Transactions that failed because the database or its disk was unusable."
)
DAMAGED: Final = gauge(
    "ferryman_database_damaged",
    "1 while the database is known to be damaged, else 0. The daily check and every transaction detect damage.",
)
UNREADABLE: Final = counter(
    "ferryman_store_unreadable_rows_total",
    "Unreadable rows found in the database. Each counts once; of a run's records only the first counts.",
    ("table",),
)
METRICS: Final = (LAG_SECONDS, ERRORS, DAMAGED, UNREADABLE)


TABLES: Final = ("corpora", "model_aliases", "model_versions", "records", "runs")
"""Whose rows are counted if they cannot be read; each is exported from the start."""


class StoreMetrics:
    """Filled by the store and by those who read it. Safe to use from every thread."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._lag = LAG_SECONDS.histogram(registry)
        self._errors = ERRORS.counter(registry)
        self._damaged = DAMAGED.gauge(registry)
        self._unreadable = UNREADABLE.counter(registry)
        for table in TABLES:
            self._unreadable.labels(table)

    def lagged(self, seconds: float) -> None:
        """Take note of how old a step was when it was read."""
        self._lag.observe(seconds)

    def watch_damage(self, damage: Callable[[], str]) -> None:
        """Export whether `damage`, which is asked from every thread, says anything."""
        self._damaged.set_function(lambda: float(bool(damage())))

    def found_unreadable(self, table: str) -> None:
        """Take note of a row of the table that cannot be read."""
        self._unreadable.labels(table).inc()

    def failed(self) -> None:
        """Take note of a transaction that failed."""
        self._errors.inc()
