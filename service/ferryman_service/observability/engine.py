"""What the decoding engines do: their own counters, read when Prometheus asks, so that a step pays for none of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, Protocol

from prometheus_client import CollectorRegistry
from prometheus_client import Metric as Family
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from ferryman_service.observability.definitions import ROWS, counter, described, gauge, histogram

STEPS: Final = counter("ferryman_engine_steps_total", "Decoding steps of all engines.")
STEP_ROWS: Final = histogram(
    "ferryman_engine_step_rows", "Rows (sentences times beam) per decoding step.", ROWS, unit="rows"
)
CACHE_BYTES: Final = gauge(
    "ferryman_engine_cache_bytes", "Memory of the key and value caches of all engines.", unit="bytes"
)
CACHE_BOOKED: Final = gauge(
    "ferryman_engine_cache_booked_bytes",
    "Memory reserved for the caches: their size if every sentence reaches its maximum length.",
    unit="bytes",
)
CACHE_LIMIT: Final = gauge(
    "ferryman_engine_cache_limit_bytes",
    "Limit of the reserved cache memory. Beyond it, sentences wait. 0: no limit.",
    unit="bytes",
)
WAITING: Final = gauge(
    "ferryman_engine_waiting_sentences", "Sentences that wait for batch rows or cache memory, by size.", ("size",)
)
SIZES: Final = ("small", "large", "long")
METRICS: Final = (STEPS, STEP_ROWS, CACHE_BYTES, CACHE_BOOKED, CACHE_LIMIT, WAITING)


class EngineCounts(Protocol):
    """What the engines count, all together, those that are gone included. Safe to call from every thread."""

    def steps_by_rows(self) -> tuple[Sequence[int], int]:
        """Return how many steps had at most so many rows, for each bound and behind the last, none counted twice; and
        the sum of all their rows."""
        ...

    def cache_bytes(self) -> int:
        """Return how much memory the caches take now."""
        ...

    def booked_bytes(self) -> int:
        """Return how much memory is booked for caches."""
        ...

    def limit_bytes(self) -> int:
        """Return how much memory may be booked; 0 without a limit."""
        ...

    def waiting(self) -> Mapping[str, int]:
        """Return how many sentences wait, by size."""
        ...


class EngineCollector(Collector):
    """Exports the counts."""

    def __init__(self, registry: CollectorRegistry, counts: EngineCounts) -> None:
        self._counts = counts
        registry.register(self)

    def describe(self) -> list[Family]:
        """Name what is exported."""
        return described(*METRICS)

    def collect(self) -> Iterator[Family]:
        """Read the counts."""
        by_rows, rows = self._counts.steps_by_rows()
        steps, step_rows, cache_bytes = STEPS.counter_family(), STEP_ROWS.histogram_family(), CACHE_BYTES.gauge_family()
        steps.add_metric((), sum(by_rows))
        bounds = [*map(floatToGoString, STEP_ROWS.buckets), "+Inf"]
        step_rows.add_metric((), list(zip(bounds, map(float, itertools.accumulate(by_rows)), strict=True)), rows)
        cache_bytes.add_metric((), self._counts.cache_bytes())
        booked, limit, waiting = CACHE_BOOKED.gauge_family(), CACHE_LIMIT.gauge_family(), WAITING.gauge_family()
        booked.add_metric((), self._counts.booked_bytes())
        limit.add_metric((), self._counts.limit_bytes())
        by_size = self._counts.waiting()
        for size in SIZES:
            waiting.add_metric((size,), by_size.get(size, 0))
        yield from (steps, step_rows, cache_bytes, booked, limit, waiting)
