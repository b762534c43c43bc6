"""The deployment files agree with each other and with the service's configuration."""

import json
import re
import tomllib
from pathlib import Path

import pytest
import yaml

from deploy.image_contents import all_contents, read_constraints
from ferryman_service.__main__ import _parser
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
    assert f"EXPOSE {DEFAULTS.port} {DEFAULTS.probe_port} {DEFAULTS.metrics_port}" in dockerfile


def test_the_image_sets_only_variables_that_the_service_reads(dockerfile):
    variables = re.findall(r"\b(FERRYMAN_\w+)=", dockerfile)
    assert set(variables) == {f"FERRYMAN_{name}" for name in ("HOST", "METRICS_HOST", "PROBE_HOST", "DATA_DIR")}
    assert all(is_setting(variable) for variable in variables)


def test_the_image_does_not_run_as_root_and_keeps_data_in_its_volume(dockerfile):
    assert re.search(r"^USER [1-9]\d+:[1-9]\d+$", dockerfile, re.MULTILINE)
    assert 'VOLUME ["/data"]' in dockerfile
    assert "FERRYMAN_DATA_DIR=/data" in dockerfile


def test_every_target_of_the_image_is_there_and_cpu_is_the_default(dockerfile):
    targets = re.findall(r"^FROM \S+ AS (\S+)$", dockerfile, re.MULTILINE)
    assert {"serving-cpu", "cuda"} <= set(targets)
    assert targets[-1] == "cpu"


def test_the_base_of_every_stage_can_be_pinned_by_one_argument(dockerfile):
    bases = re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE)
    stages = re.findall(r" AS (\S+)$", dockerfile, re.MULTILINE)
    assert {base for base in bases if base not in stages} == {"${PYTHON_IMAGE}"}


def test_everything_that_the_image_installs_is_locked(dockerfile):
    installs = re.findall(r"pip install (.*)", dockerfile)
    locked, product = installs[::2], installs[1::2]
    assert locked == [f"--require-hashes -r locks/{target}.txt" for target in ("serving-cpu", "cpu", "cuda")]
    assert len(product) == 3
    assert all(arguments.startswith("-c constraints.txt --no-deps ") for arguments in product)


def test_locks_hold_what_is_computed_for_the_images():
    for contents in all_contents(ROOT):
        text = (ROOT / f"deploy/locks/{contents.target}.txt").read_text()
        lines = [line for line in text.splitlines() if not line.startswith("#")]
        assert all(re.fullmatch(r"\S+==\S+ --hash=sha256:[0-9a-f]{64}", line) for line in lines)
        locked = {name: str(version) for name, version in read_constraints(re.sub(r" --hash=.*", "", text)).items()}
        wanted = {package.name: package.version for package in contents.packages if package.name != "ferryman"}
        assert wanted.keys() <= locked.keys()
        assert contents.unknown or wanted.keys() == locked.keys(), "what is installed here tells what it needs"
        assert {name: version.removesuffix("+cpu") for name, version in locked.items() if name in wanted} == wanted
        assert locked.get("torch", "+cpu").endswith("+cpu") == (contents.target != "cuda")


def test_build_tools_are_pinned_to_the_constraints():
    constraints = read_constraints((ROOT / "constraints.txt").read_text())
    tools = read_constraints(
        "\n".join(tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"])
    )
    assert "hatchling" in tools
    assert tools == {name: constraints[name] for name in tools}


def test_the_build_may_read_what_it_copies(dockerfile):
    allowed = re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    copied = [
        name for names in re.findall(r"^COPY (?!--from)(.*) \S+$", dockerfile, re.MULTILINE) for name in names.split()
    ]
    assert set(copied) == set(allowed)
    assert all((ROOT / name).exists() for name in copied)


def test_the_image_starts_the_service_without_a_shell_and_below_an_init(dockerfile):
    assert 'ENTRYPOINT ["tini", "--", "ferryman-service"]' in dockerfile
    assert all(command.startswith("[") for command in re.findall(r"^CMD (.*)$", dockerfile, re.MULTILINE))


def test_the_images_check_asks_the_probe_port_by_a_command_that_exists(dockerfile):
    [command] = re.findall(r"^HEALTHCHECK .* CMD (\[.*\])$", dockerfile, re.MULTILINE)
    program, *arguments = json.loads(command)
    assert program == "ferryman-service"
    arguments = _parser().parse_args(arguments)
    assert (arguments.command, arguments.probe) == ("health", True)


def test_every_image_is_labelled_with_what_it_was_built_from(dockerfile):
    images = re.split(r"^FROM runtime AS \S+$", dockerfile, flags=re.MULTILINE)[1:]
    assert len(images) == 3
    for image in images:
        labels = dict(re.findall(r'org\.opencontainers\.image\.(\w+)="\$\{(\w+)\}"', image))
        assert labels == {"version": "VERSION", "revision": "REVISION", "source": "SOURCE"}
        assert set(re.findall(r"^ARG (\w+)", image, re.MULTILINE)) == set(labels.values())


def test_setup_pins_the_torch_that_the_constraints_pin():
    pinned = re.search(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert f"torch=={pinned[1]}" in (ROOT / "Makefile").read_text()


def test_compose_sets_only_variables_that_the_service_reads(compose):
    assert all(is_setting(variable) for variable in compose["services"]["ferryman"]["environment"])


def test_compose_publishes_the_services_port_on_loopback_only(compose):
    assert compose["services"]["ferryman"]["ports"] == [f"127.0.0.1:{DEFAULTS.port}:{DEFAULTS.port}"]


def test_compose_waits_longer_than_the_service_drains(compose):
    service = compose["services"]["ferryman"]
    grace_s = float(service["environment"]["FERRYMAN_GRACE_S"])
    assert int(service["stop_grace_period"].removesuffix("s")) > DEFAULTS.drain_s + grace_s + 5, "it allows itself 5 s"


@pytest.mark.parametrize("name", ["ferryman", "prometheus", "grafana"])
def test_compose_gives_no_rights_away(compose, name):
    service = compose["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]


def test_compose_starts_what_watches_only_when_asked(compose):
    services = compose["services"]
    assert {name: service.get("profiles") for name, service in services.items()} == {
        "ferryman": None,
        "prometheus": ["monitoring"],
        "grafana": ["monitoring"],
    }


def test_compose_pins_the_images_of_others(compose):
    for name in ("prometheus", "grafana"):
        assert re.fullmatch(r"\S+:v?\d+\.\d+\.\d+(@sha256:[0-9a-f]{64})?", compose["services"][name]["image"])


def test_every_port_is_published_on_loopback_only(compose):
    ports = [port for service in compose["services"].values() for port in service["ports"]]
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_what_is_mounted_from_here_is_there(compose):
    mounted = [volume.split(":")[0] for service in compose["services"].values() for volume in service["volumes"]]
    paths = [ROOT / "deploy" / name for name in mounted if name.startswith(".")]
    assert paths
    assert all(path.exists() for path in paths)


def test_named_volumes_are_declared(compose):
    mounted = {volume.split(":")[0] for service in compose["services"].values() for volume in service["volumes"]}
    assert {name for name in mounted if not name.startswith(".")} == set(compose["volumes"])


def test_prometheus_scrapes_the_service_and_finds_its_rules(compose):
    config = yaml.safe_load((ROOT / "deploy/prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    host, port = target.split(":")
    assert host in compose["services"]
    assert int(port) == DEFAULTS.metrics_port
    mounts = dict(volume.split(":")[1::-1] for volume in compose["services"]["prometheus"]["volumes"])
    for pattern in config["rule_files"]:
        folder, _, names = f"/etc/prometheus/{pattern}".rpartition("/")
        assert list((ROOT / "deploy" / mounts[folder]).glob(names)), pattern


def test_grafana_finds_prometheus_and_the_dashboards(compose):
    grafana = compose["services"]["grafana"]
    provisioned = {each["target"].split("/")[4]: each["source"] for each in grafana["configs"]}
    contents = {kind: yaml.safe_load(compose["configs"][source]["content"]) for kind, source in provisioned.items()}
    [source] = contents["datasources"]["datasources"]
    assert source["url"] == "http://prometheus:9090"
    [provider] = contents["dashboards"]["providers"]
    mounts = dict(volume.split(":")[1::-1] for volume in grafana["volumes"])
    dashboards = ROOT / "deploy" / mounts[provider["options"]["path"]]
    assert list(dashboards.glob("*.json"))


def test_the_readme_tells_the_sizes_that_are_computed():
    readme = (ROOT / "deploy/README.md").read_text()
    for contents in all_contents(ROOT):
        if not contents.unknown:
            megabytes = contents.known_bytes / 1e6
            row = re.search(rf"^\| `{contents.target}`[^|]*\| (\d+) \| about ([\d,]+) \|$", readme, re.MULTILINE)
            assert int(row[1]) == len(contents.packages)
            assert float(row[2].replace(",", "")) == pytest.approx(megabytes, rel=0.05)
