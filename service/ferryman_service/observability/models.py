"""The models in memory, as they are when Prometheus asks; how long they took to load, and what could not be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final

from prometheus_client import CollectorRegistry
from prometheus_client import Metric as Family
from prometheus_client.registry import Collector

from ferryman_service.domain.models import LoadedModel
from ferryman_service.observability.definitions import counter, described, gauge, histogram

_LOAD_SECONDS: Final = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)

LOADED: Final = gauge(
    "ferryman_model_loaded_info",
    "1 for each model version in memory. The label compute_type gives its arithmetic.",
    ("model", "version", "compute_type"),
)
MEMORY_BYTES: Final = gauge(
    "ferryman_model_memory_bytes",
    "Memory of a loaded model version, without the caches of calls in flight.",
    ("model", "version"),
    "bytes",
)
LOAD_SECONDS: Final = histogram(
    "ferryman_model_load_seconds",
    "Duration of a model load, from the first byte read to the end of the warm-up.",
    _LOAD_SECONDS,
)
LOAD_FAILURES: Final = counter(
    "ferryman_model_load_failures_total",
    "Failed model loads: damaged files, a model too large for the limit, or out of memory.",
)
METRICS: Final = (LOADED, MEMORY_BYTES, LOAD_SECONDS, LOAD_FAILURES)


class LoadMetrics:
    """What application.ports.LoadObserver asks for. Safe to use from every thread."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._seconds = LOAD_SECONDS.histogram(registry)
        self._failures = LOAD_FAILURES.counter(registry)

    def loaded(self, seconds: float) -> None:
        """Take note of a model that was loaded and warmed up."""
        self._seconds.observe(seconds)

    def failed(self) -> None:
        """Take note of a model that could not be loaded."""
        self._failures.inc()


class LoadedModelsCollector(Collector):
    """Exports the models in memory: a version's labels are there as long as it is."""

    def __init__(self, registry: CollectorRegistry, loaded: Callable[[], Sequence[LoadedModel]]) -> None:
        """`loaded` tells which they are, from every thread."""
        self._loaded = loaded
        registry.register(self)

    def describe(self) -> list[Family]:
        """Name what is exported."""
        return described(LOADED, MEMORY_BYTES)

    def collect(self) -> Iterator[Family]:
        """Look at the models."""
        info, memory = LOADED.gauge_family(), MEMORY_BYTES.gauge_family()
        for model in self._loaded():
            name, _, version = model.reference.partition("/")
            info.add_metric((name, version, model.compute_type.value), 1)
            memory.add_metric((name, version), model.memory_bytes)
        yield from (info, memory)
