"""docs/operations.md is true: the commands for one machine run, in order, as a newcomer would run them; those for
Kubernetes are rendered, and what they name is there."""

import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tomllib
from contextlib import ExitStack, suppress
from importlib.metadata import version
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from tests.docs.markdown import blocks_of, marked
from tests.fakes.trace_collector import Collector
from tests.ops.conftest import need_program, run
from tests.ops.rendered_chart import ROOT, Manifests

pytestmark = pytest.mark.ops

GUIDE = ROOT / "docs/operations.md"
KUBERNETES = GUIDE.read_text(encoding="utf-8").split("\n## On Kubernetes\n")[1]
PORTS = ("50051", "50052", *(f"50{n}" for n in ("061", "062", "071", "072", "081", "082", "091", "092")))
PORTS += ("9461", "9471", "9481", "9491", "9090", "9901")
COLLECTOR_PORT = "4317"
KUBERNETES_VERSION = "1.32"
WALK_LIMIT_S = 240
TRANSLATED = r"Zimmer( \S+)? ist frei"
"""What a toy makes of "room 123 is free", after seconds of training: the digits are not always right, or there."""


# One machine


class Walk:
    """The commands for one machine, run in a folder of their own, with free ports in the place of those of the page."""

    def __init__(self, home):
        self.folder, self.collector = home / "srv", Collector()
        self.folder.mkdir()
        self._ports = {**free_ports(PORTS), COLLECTOR_PORT: self.collector.endpoint.rpartition(":")[2]}
        self._copy_of_deploy(home / "ferryman/deploy")
        try:
            self.sections = self._run(home)
        finally:
            self.collector.stop()

    def _with_free_ports(self, text):
        return re.sub(r"\b(" + "|".join(self._ports) + r")\b", lambda found: self._ports[found[0]], text)

    def _copy_of_deploy(self, deploy):
        deploy.mkdir(parents=True)
        shutil.copytree(ROOT / "deploy/prometheus", deploy / "prometheus")
        scrapes = (ROOT / "deploy/prometheus.yml").read_text()
        (deploy / "prometheus.yml").write_text(re.sub(r"(scrape_\w+): \d+s", r"\1: 2s", scrapes))
        (deploy / "envoy").mkdir()
        text = (ROOT / "deploy/envoy/envoy.yaml").read_text()
        (deploy / "envoy/envoy.yaml").write_text(self._with_free_ports(text))

    def _run(self, home):
        blocks = marked("docs/operations.md", "run by", "ops")
        script = "".join(f"echo '## {block.heading}'\n{block.text}\n" for block in blocks)
        script = script.replace("drain_s = 5", "drain_s = 3")  # Envoy needs two seconds while processes answer
        (home / "walk.sh").write_text(self._with_free_ports(script))
        environment = {
            "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin",
            "HOME": str(home),
            "OMP_NUM_THREADS": "1",
            "FERRYMAN_SERVER": f"localhost:{self._ports['50051']}",
        }
        command = ["bash", "-eu", str(home / "walk.sh")]
        output = home / "output"
        with output.open("wb") as log:
            shell = subprocess.Popen(
                command, cwd=self.folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        try:
            status = shell.wait(WALK_LIMIT_S)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGKILL)
        assert status == 0, output.read_text()[-6000:]
        parts = re.split(r"^## (.+)\n", output.read_text(), flags=re.MULTILINE)[1:]
        sections = {}
        for heading, text in zip(parts[::2], parts[1::2], strict=True):
            sections[heading] = sections.get(heading, "") + text
        return sections

    def log(self, name):
        """Return the lines of a log that are JSON objects."""
        lines = []
        for line in (self.folder / f"log/{name}.log").read_text().splitlines():
            with suppress(json.JSONDecodeError):
                lines.append(json.loads(line))
        return lines


def free_ports(names):
    """Ports below those that the system gives to outgoing connections, which could take one before it is used."""
    with ExitStack() as stack:
        return {name: str(port) for name, port in zip(names, unused_ports(stack), strict=False)}


def unused_ports(stack):
    """Yield unused ports, at random, each held until the stack ends."""
    for port in random.sample(range(10_000, 32_768), 22_768):
        each = stack.enter_context(socket.socket())
        with suppress(OSError):
            each.bind(("127.0.0.1", port))
            yield port


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    for program, package in (("prometheus", "prometheus"), ("amtool", "prometheus-alertmanager")):
        need_program(program, package)
    for program in ("curl", "jq"):
        need_program(program, program)
    return Walk(tmp_path_factory.mktemp("operator"))


def test_three_processes_start(walk):
    assert walk.sections["Start"].split() == ["SERVING"] * 3
    assert walk.sections["Configure"].count("the configuration is valid") == 3


def test_envoy_and_prometheus_take_their_configurations(walk):
    assert "SUCCESS" in walk.sections["Prometheus and alerts"]
    assert "FAILED" not in walk.sections["Prometheus and alerts"]


def test_nothing_listens_but_on_loopback(walk):
    configured = yaml.safe_load((walk.folder / "etc/envoy.yaml").read_text())
    listening = [each["address"] for each in (configured["admin"], *configured["static_resources"]["listeners"])]
    assert {each["socket_address"]["address"] for each in listening} == {"127.0.0.1"}
    for path in (walk.folder / "etc").glob("t*.toml"):
        assert "host" not in tomllib.loads(path.read_text()), "loopback is the default"


def test_a_model_is_trained_imported_and_promoted(walk):
    assert "succeeded: published en-de/1" in walk.sections["Train a first model"]
    assert "published en-de/2" in walk.sections["Train a first model"]
    assert "en-de@production is en-de/2" in walk.sections["Switch to a new model version"]
    assert re.fullmatch(TRANSLATED, walk.sections["Switch to a new model version"].splitlines()[-1])


def test_prometheus_sees_all_and_nothing_fires(walk):
    up = re.findall(r"^up\{.*\} => (\d) ", walk.sections["Monitor"], re.MULTILINE)
    assert up == ["1"] * 3
    assert "ALERTS{" not in walk.sections["Monitor"]
    assert 'ferryman_model_loaded_info{compute_type="fp32",model="en-de",version="2"} 1.0' in walk.sections["Monitor"]


def test_the_logs_tell_about_one_call(walk):
    lines = [json.loads(line) for line in walk.sections["Monitor"].splitlines() if line.startswith('{"')]
    assert lines
    assert len({line["request_id"] for line in lines}) == 1
    assert lines[-1]["model"] == "en-de/2"


def test_the_logs_tell_what_started_as_which_version(walk):
    starts = re.findall(rf"^\S+Z starting {re.escape(version('ferryman'))}$", walk.sections["Monitor"], re.MULTILINE)
    assert len(starts) >= 3
    assert (
        len(
            re.findall(r"^\S+Z the database was brought from nothing to schema", walk.sections["Monitor"], re.MULTILINE)
        )
        == 1
    )


def test_no_call_fails_while_every_process_is_restarted(walk):
    [answers] = walk.sections["Rolling restart"].splitlines()  # all the same, and no line of a failure
    count, _, answer = answers.strip().partition(" ")
    assert int(count) >= 5
    assert re.fullmatch(TRANSLATED, answer)
    for name in ("translation-1", "translation-2"):
        starts = [line for line in walk.log(name) if line["message"].startswith("serving on")]
        assert len(starts) >= 2


def test_traces_reach_the_collector(walk):
    assert walk.collector.named("ferryman.v1.TranslationService/Translate")


def test_the_backup_serves(walk):
    assert re.fullmatch(TRANSLATED, walk.sections["Back up and restore"].splitlines()[-1])


def test_what_takes_space_can_be_deleted(walk):
    assert "data/ferryman.db" in walk.sections["Free disk space"]
    assert not (walk.folder / "data/models/en-de/1").exists()
    assert (walk.folder / "data/models/en-de/2").is_dir()


def test_every_process_ends_by_itself(walk):
    for name in ("training", "translation-1", "translation-2"):
        assert not [line for line in walk.log(name) if line["level"] == "ERROR"]
        pid = int((walk.folder / f"run/{name}.pid").read_text())
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_systemd_takes_the_unit(tmp_path):
    [unit] = [block.text for block in blocks_of("docs/operations.md") if block.language == "ini"]
    service = str(Path(sys.executable).with_name("ferryman-service"))
    unit = unit.replace("/opt/ferryman/current/bin/ferryman-service", service).replace("User=ferryman", "User=daemon")
    (tmp_path / "ferryman@.service").write_text(unit)
    verify = need_program("systemd-analyze", "systemd")
    ended = subprocess.run(
        [verify, "verify", str(tmp_path / "ferryman@training.service")], capture_output=True, text=True
    )
    complaints = [line for line in ended.stderr.splitlines() if "ferryman@" in line]
    assert complaints == []


# Kubernetes


class Cluster:
    """What the commands for Kubernetes would make: helm's are rendered and validated, the others are looked at."""

    def __init__(self, tools, folder):
        self._helm, self._kubectl = tools
        self._folder = folder
        self.releases = {}
        self.checked = []
        (folder / "deploy").symlink_to(ROOT / "deploy")

    def follow(self, text):
        """Run the files that a block writes, and check its commands."""
        script, commands = [], []
        lines = iter(text.replace("\\\n", " ").splitlines())
        for line in lines:
            if line.startswith("cat >"):
                script += [line, *iter(lambda: next(lines), "YAML"), "YAML"]
            else:
                commands.append(shlex.split(line))
        subprocess.run(["bash", "-eu", "-c", "\n".join(script)], cwd=self._folder, check=True)
        for command in commands:
            {"helm": self._check_helm, "kubectl": self._check_kubectl}[command[0]](command[1:])
            self.checked.append(command)

    def _check_helm(self, arguments):
        verb = arguments[0]
        self._check_flags(self._helm, [verb], arguments)
        if verb == "lint":
            run([self._helm, *arguments], cwd=self._folder)
        elif verb in ("install", "upgrade"):
            left_out = ("--wait", "--timeout", "10m", "--install")
            rest = [each for each in arguments[1:] if each not in left_out]
            text = run([self._helm, "template", *rest], cwd=self._folder)
            self.releases[rest[0]] = Manifests(text)
            for each in self.releases[rest[0]].objects:
                if not each["apiVersion"].startswith(("monitoring.coreos.com", "keda.sh", "gateway.networking")):
                    kubernetes_validate.validate(each, KUBERNETES_VERSION, strict=True)
        else:
            assert verb in ("test", "history", "uninstall")
            assert arguments[1] in self.releases

    def _check_kubectl(self, arguments):
        if arguments[0] == "--namespace":
            assert arguments[1] == "ferryman"
            arguments = arguments[2:]
        if arguments[0] == "create":
            offline = ["--dry-run=client", "--output", "yaml", *(["--validate=false"] * ("--filename" in arguments))]
            made = self._created(arguments, offline)
            assert made["metadata"]["name"]
            return
        for kind, name in re.findall(r"\b(deployment|service)/(\S+)", " ".join(arguments)):
            assert name in self._names(kind), (name, arguments)
        verbs = arguments[: 2 if arguments[0] == "rollout" else 1]
        self._check_flags(self._kubectl, verbs, arguments)

    def _check_flags(self, program, verbs, arguments):
        own = arguments[: arguments.index("--")] if "--" in arguments else arguments
        known = run([program, *verbs, "--help"])
        assert "unknown command" not in known
        for flag in (each.partition("=")[0] for each in own if each.startswith("--")):
            assert re.search(rf"{flag}\b", known), (flag, verbs)

    def _created(self, arguments, offline):
        if "--filename" in arguments:  # a kind of its own, which kubectl does not know without a cluster
            return yaml.safe_load((self._folder / arguments[arguments.index("--filename") + 1]).read_text())
        return yaml.safe_load(run([self._kubectl, *arguments, *offline], cwd=self._folder))

    def _names(self, kind):
        objects = [each for release in self.releases.values() for each in release.objects]
        return {each["metadata"]["name"] for each in objects if each["kind"].lower() == kind}


@pytest.fixture(scope="module")
def cluster(helm_and_kubectl, tmp_path_factory):
    cluster = Cluster(helm_and_kubectl, tmp_path_factory.mktemp("cluster"))
    for block in marked("docs/operations.md", "rendered by", "ops"):
        cluster.follow(block.text)
    return cluster


def test_what_helm_and_kubectl_are_told_is_right(cluster):
    assert {command[0] for command in cluster.checked} == {"helm", "kubectl"}
    assert set(cluster.releases) == {"ferryman", "translate"}


def test_the_names_that_the_page_speaks_of_are_there(cluster):
    objects = [each for release in cluster.releases.values() for each in release.objects]
    names = {each["metadata"]["name"] for each in objects}
    spoken_of = set(re.findall(r"\bferryman-(?:control|serving|serving-headless|data|metrics)\b", KUBERNETES))
    assert spoken_of
    assert spoken_of <= names


def test_the_values_that_the_page_speaks_of_are_values(helm_and_kubectl):
    values = yaml.safe_load(run([helm_and_kubectl[0], "show", "values", "deploy/helm/ferryman"], cwd=ROOT))
    parts = "serving|controlPlane|persistence|networkPolicy|test"
    spoken_of = set(re.findall(rf"\b((?:{parts})(?:\.[a-zA-Z]+)+)\b", KUBERNETES)) - {"serving.yaml"}
    assert spoken_of
    for path in spoken_of:
        found = values
        for key in path.split("."):
            assert key in found, path
            found = found[key]
