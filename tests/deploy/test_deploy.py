"""The deployment files agree with each other and with the service's configuration."""

import re
from pathlib import Path

import pytest
import yaml

from ferryman_service.config.service_config import ENVIRONMENT_PREFIX, ServiceConfig

ROOT = Path(__file__).parents[2]
DEFAULTS = ServiceConfig()


@pytest.fixture(scope="module")
def compose():
    return yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())


@pytest.fixture(scope="module")
def dockerfile():
    return (ROOT / "Dockerfile").read_text()


def is_setting(variable):
    return variable.removeprefix(ENVIRONMENT_PREFIX).lower() in ServiceConfig.__dataclass_fields__


def test_the_image_exposes_the_services_ports(dockerfile):
    assert f"EXPOSE {DEFAULTS.port} {DEFAULTS.metrics_port}" in dockerfile


def test_the_image_sets_only_variables_that_the_service_reads(dockerfile):
    variables = re.findall(r"\b(FERRYMAN_\w+)=", dockerfile)
    assert len(variables) == 3
    assert all(is_setting(variable) for variable in variables)


def test_the_image_does_not_run_as_root_and_keeps_data_in_its_volume(dockerfile):
    assert re.search(r"^USER [1-9]\d+:[1-9]\d+$", dockerfile, re.MULTILINE)
    assert 'VOLUME ["/data"]' in dockerfile
    assert "FERRYMAN_DATA_DIR=/data" in dockerfile


def test_every_target_of_the_image_is_there_and_cpu_is_the_default(dockerfile):
    targets = re.findall(r"^FROM \S+ AS (\S+)$", dockerfile, re.MULTILINE)
    assert "cuda" in targets
    assert targets[-1] == "cpu"


def test_the_image_pins_the_torch_that_the_constraints_pin(dockerfile):
    pinned = re.search(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert set(re.findall(r"torch==(\S+)", dockerfile)) == {pinned[1]}
    assert f"torch=={pinned[1]}" in (ROOT / "Makefile").read_text()


def test_compose_sets_only_variables_that_the_service_reads(compose):
    assert all(is_setting(variable) for variable in compose["services"]["ferryman"]["environment"])


def test_compose_publishes_the_services_port_on_loopback_only(compose):
    assert compose["services"]["ferryman"]["ports"] == [f"127.0.0.1:{DEFAULTS.port}:{DEFAULTS.port}"]


def test_compose_waits_longer_than_the_service_drains(compose):
    service = compose["services"]["ferryman"]
    grace_s = float(service["environment"]["FERRYMAN_GRACE_S"])
    assert int(service["stop_grace_period"].removesuffix("s")) > grace_s


@pytest.mark.parametrize("name", ["ferryman", "prometheus"])
def test_compose_gives_no_rights_away(compose, name):
    service = compose["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]


def test_named_volumes_are_declared(compose):
    mounted = {volume.split(":")[0] for service in compose["services"].values() for volume in service["volumes"]}
    assert {name for name in mounted if not name.startswith(".")} == set(compose["volumes"])


def test_prometheus_scrapes_the_service(compose):
    config = yaml.safe_load((ROOT / "deploy/prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    host, port = target.split(":")
    assert host in compose["services"]
    assert int(port) == DEFAULTS.metrics_port
