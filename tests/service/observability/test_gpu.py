"""What /metrics tells of GPUs, from a stand-in for the module pynvml."""

import sys

import pytest

from ferryman_service.observability.gpu import GpuCollector, open_nvml
from tests.fakes.nvml import FakeNvml


def samples(registry):
    return {(s.name, s.labels["gpu"]): s.value for family in registry.collect() for s in family.samples}


def test_each_gpu_tells_its_memory_and_utilization(registry):
    GpuCollector(registry, FakeNvml([(10, 80, 25), (0, 40, 100)]))
    assert samples(registry) == {
        ("ferryman_gpu_memory_used_bytes", "0"): 10,
        ("ferryman_gpu_memory_total_bytes", "0"): 80,
        ("ferryman_gpu_utilization_ratio", "0"): 0.25,
        ("ferryman_gpu_memory_used_bytes", "1"): 0,
        ("ferryman_gpu_memory_total_bytes", "1"): 40,
        ("ferryman_gpu_utilization_ratio", "1"): 1.0,
    }


def test_values_that_a_gpu_does_not_report_are_left_out(registry):
    GpuCollector(registry, FakeNvml([(10, 80, None), (0, 40, 50)]))
    assert ("ferryman_gpu_utilization_ratio", "0") not in samples(registry)
    assert samples(registry)["ferryman_gpu_memory_total_bytes", "0"] == 80
    assert samples(registry)["ferryman_gpu_utilization_ratio", "1"] == 0.5


def test_a_driver_that_is_gone_spoils_no_scrape(registry):
    nvml = FakeNvml([(10, 80, 25)])
    GpuCollector(registry, nvml)
    nvml.is_lost = True
    assert samples(registry) == {}


@pytest.mark.parametrize(("starts", "found"), [(True, True), (False, False)])
def test_nvml_is_used_where_it_answers(monkeypatch, starts, found):
    nvml = FakeNvml([], starts=starts)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert open_nvml() is (nvml if found else None)


def test_without_the_package_there_is_no_nvml(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert open_nvml() is None
