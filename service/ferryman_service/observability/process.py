"""This process and where it lives: what was built, what it says of its health, the disk of its data folder."""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

from prometheus_client import CollectorRegistry
from prometheus_client import Metric as Family
from prometheus_client.registry import Collector

from ferryman_service.observability.definitions import described, gauge

BUILD: Final = gauge(
    "ferryman_build_info", "Always 1. The labels give the version and the roles of this process.", ("version", "roles")
)
SERVING: Final = gauge(
    "ferryman_health_serving",
    "1 while grpc.health.v1 answers SERVING, else 0. `overall` stands for the empty service name.",
    ("service",),
)
DATA_FREE: Final = gauge(
    "ferryman_data_free_bytes",
    "Free space that this process may use on the file system of the data folder.",
    unit="bytes",
)
DATA_SIZE: Final = gauge("ferryman_data_size_bytes", "Size of the file system of the data folder.", unit="bytes")
METRICS: Final = (BUILD, SERVING, DATA_FREE, DATA_SIZE)
_OVERALL: Final = "overall"


def tell_build(registry: CollectorRegistry, roles: Iterable[str]) -> None:
    """Tell what runs here."""
    BUILD.gauge(registry).labels(importlib.metadata.version("ferryman"), ",".join(sorted(roles))).set(1)


class HealthCollector(Collector):
    """Exports what the health service answers."""

    def __init__(self, registry: CollectorRegistry, serving: Callable[[], Mapping[str, bool]]) -> None:
        """`serving` tells of each name, from every thread; "" is the process as a whole."""
        self._serving = serving
        registry.register(self)

    def describe(self) -> list[Family]:
        """Name what is exported."""
        return described(SERVING)

    def collect(self) -> Iterator[Family]:
        """Ask the health service."""
        family = SERVING.gauge_family()
        for service, serving in self._serving().items():
            family.add_metric((service or _OVERALL,), serving)
        yield family


class DataFolderCollector(Collector):
    """Exports how full the disk of the data folder is; nothing while it cannot be asked."""

    def __init__(self, registry: CollectorRegistry, folder: Path) -> None:
        self._folder = folder
        registry.register(self)

    def describe(self) -> list[Family]:
        """Name what is exported."""
        return described(DATA_FREE, DATA_SIZE)

    def collect(self) -> Iterator[Family]:
        """Ask the file system."""
        free, size = DATA_FREE.gauge_family(), DATA_SIZE.gauge_family()
        try:
            usage = shutil.disk_usage(self._folder)
        except OSError:
            pass
        else:
            free.add_metric((), usage.free)
            size.add_metric((), usage.total)
        yield from (free, size)
