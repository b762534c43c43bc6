"""The GPUs of this machine, by NVML: nothing where there is no driver, or no nvidia-ml-py."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any, Final

from prometheus_client import CollectorRegistry
from prometheus_client import Metric as Family
from prometheus_client.registry import Collector

from ferryman_service.observability.definitions import described, gauge

MEMORY_USED: Final = gauge("ferryman_gpu_memory_used_bytes", "GPU memory in use by all processes.", ("gpu",), "bytes")
MEMORY_TOTAL: Final = gauge("ferryman_gpu_memory_total_bytes", "Total GPU memory.", ("gpu",), "bytes")
UTILIZATION: Final = gauge(
    "ferryman_gpu_utilization_ratio", "Share of the last sample period in which a kernel ran, 0 to 1.", ("gpu",)
)
METRICS: Final = (MEMORY_USED, MEMORY_TOTAL, UTILIZATION)


def open_nvml() -> Any | None:  # noqa: ANN401 (a module without types)
    """Return the module pynvml, ready for use; None where it or a driver is missing."""
    try:
        nvml: Any = importlib.import_module("pynvml")
        nvml.nvmlInit()
    except Exception:  # noqa: BLE001 (a missing package or library, or a driver that does not answer: no GPU to watch)
        return None
    return nvml


def gpu_memory_bytes(nvml: Any) -> int:  # noqa: ANN401
    """Return the memory of all GPUs together, 0 if none tells it."""
    total = 0
    with contextlib.suppress(nvml.NVMLError):
        for index in range(nvml.nvmlDeviceGetCount()):
            total += int(nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByIndex(index)).total)
    return total


class GpuCollector(Collector):
    """Exports what NVML tells of each GPU; `gpu` is its index. What a GPU does not answer is left out."""

    def __init__(self, registry: CollectorRegistry, nvml: Any) -> None:  # noqa: ANN401
        """Store; `nvml` is what `open_nvml` returned."""
        self._nvml = nvml
        registry.register(self)

    def describe(self) -> list[Family]:
        """Name what is exported."""
        return described(*METRICS)

    def collect(self) -> Iterator[Family]:
        """Ask every GPU."""
        used, total, utilization = families = [metric.gauge_family() for metric in METRICS]
        for index in range(self._count()):
            label = (str(index),)
            # One by one: a MIG slice tells its memory, but no utilization.
            with contextlib.suppress(self._nvml.NVMLError):
                gpu = self._nvml.nvmlDeviceGetHandleByIndex(index)
                memory = self._nvml.nvmlDeviceGetMemoryInfo(gpu)
                used.add_metric(label, memory.used)
                total.add_metric(label, memory.total)
                utilization.add_metric(label, self._nvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100)
        yield from families

    def _count(self) -> int:
        try:
            return int(self._nvml.nvmlDeviceGetCount())
        except self._nvml.NVMLError:
            return 0
