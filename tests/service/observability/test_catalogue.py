"""The page docs/metrics.md says what the service exports, no more and no less."""

import re
from pathlib import Path

import pytest

from ferryman_service.bootstrap import build_service
from ferryman_service.config.service_config import Role, ServiceConfig
from ferryman_service.observability import gpu
from ferryman_service.observability.catalogue import GROUPS, LABELS, all_metrics, page
from ferryman_service.observability.definitions import counter

PAGE = Path(__file__).parents[3] / "docs" / "metrics.md"


def documented():
    """The names in the first column of the page's tables of metrics, with their type and labels."""
    tables = PAGE.read_text(encoding="utf-8").split("## Labels")[0]
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| ([^|]*) \|", tables, re.MULTILINE)
    return {name: (kind, tuple(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}


def exported(registry):
    """The names that a registry exports, with their types; whatever has no sample yet included."""
    return {family.name + ("_total" if family.type == "counter" else ""): family.type for family in registry.collect()}


def test_the_page_is_what_the_code_makes():
    assert PAGE.read_text(encoding="utf-8") == page(), "run `make metrics-docs`"


async def test_the_page_tells_what_the_service_exports_and_nothing_else(tmp_path):
    service = build_service(ServiceConfig(data_dir=tmp_path / "data"))
    names = exported(service._endpoint.registry)
    on_the_page = {name: kind for name, (kind, _) in documented().items()}
    for metric in gpu.METRICS:
        on_the_page.pop(metric.name)
        names.pop(metric.name, None)
    assert names == on_the_page


@pytest.mark.parametrize("role", Role)
async def test_a_process_of_one_role_exports_the_same_names(tmp_path, role):
    service = build_service(ServiceConfig(data_dir=tmp_path / "data", roles=frozenset({role})))
    assert set(exported(service._endpoint.registry)) >= set(documented()) - {metric.name for metric in gpu.METRICS}


def test_every_metric_is_defined_once_and_explained():
    names = [metric.name for metric in all_metrics()]
    assert len(names) == len(set(names))
    assert {label for metric in all_metrics() for label in metric.labels} == set(LABELS)
    assert all(metric.text.endswith(".") for metric in all_metrics())
    assert all(len(group.text) > 20 for group in GROUPS)


def test_names_and_units_follow_the_conventions():
    units = {"seconds": "_seconds", "bytes": "_bytes"}
    for metric in all_metrics():
        assert metric.name.startswith(("ferryman_", "grpc_server_")), metric
        if metric.unit in units:
            assert metric.name.endswith(units[metric.unit]), metric
        for unit, suffix in units.items():
            if metric.name.endswith(suffix):
                assert metric.unit == unit, metric
        assert list(metric.buckets) == sorted(set(metric.buckets)), metric


def test_a_counter_must_say_that_it_is_one():
    with pytest.raises(AssertionError, match="_total"):
        counter("ferryman_things", "Things.")
