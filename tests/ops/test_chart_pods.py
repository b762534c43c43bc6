"""A serving pod of the chart on this machine: its commands, variables, files and probes, with other paths and ports."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ferryman_service.rpc.health import check_health
from tests.ops.rendered_chart import Manifests, config_file, environment, main_container, template, value_file

pytestmark = pytest.mark.ops

START_S = 60


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


class LocalPod:
    """Runs what the containers of a pod run, where the pod's volumes are folders of the test's."""

    def __init__(self, manifests, pod, folder, bundles):
        self.pod = pod
        self.data = folder / "data"
        self.data.mkdir()
        self.data.chmod(0o2777)  # as an emptyDir of a pod with an fsGroup
        (folder / "ferryman.toml").write_text(config_file(manifests, pod))
        self._paths = {"/data": self.data, "/models": bundles, "/etc/ferryman/config": folder}
        # The host differs too: an address of IPv6 need not be there.
        self._variables = {"FERRYMAN_HOST": "127.0.0.1", "FERRYMAN_PROBE_HOST": "127.0.0.1"}
        self._variables |= {f"FERRYMAN_{name}": str(free_port()) for name in ("PORT", "PROBE_PORT", "METRICS_PORT")}
        self._variables["FERRYMAN_METRICS_HOST"] = "127.0.0.1"
        self.port, self.probe_port = (int(self._variables[f"FERRYMAN_{name}"]) for name in ("PORT", "PROBE_PORT"))

    def variables(self, container):
        own = {name: self.here(value) for name, value in environment(container).items()}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return {**os.environ, **own, **self._variables, "PATH": path}

    def here(self, text):
        found = "|".join(map(re.escape, self._paths))
        return re.sub(rf"(?<![\w.])({found})(?![\w.-])", lambda match: str(self._paths[match[0]]), text)

    def run(self, container):
        """Run a container to its end; return its output."""
        command = [self.here(part) for part in container["command"]]
        assert not any(re.search("(^| )/data", part) for part in command), "this would empty the machine's own folder"
        ended = subprocess.run(command, env=self.variables(container), capture_output=True, text=True, timeout=120)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    def start(self):
        container = main_container(self.pod)
        command = ["ferryman-service", *container["args"]]
        return subprocess.Popen(command, env=self.variables(container))

    def probe(self, name):
        return check_health(f"127.0.0.1:{self.probe_port}", main_container(self.pod)[name]["grpc"]["service"], 5)


@pytest.fixture(scope="module")
def manifests(helm_and_kubectl):
    # A second of drain instead of five: the test has to wait for it.
    settings = ("--set", "shutdown.drainSeconds=1")
    code, text, errors = template(helm_and_kubectl[0], "--values", value_file("separate-serving"), *settings)
    assert code == 0, errors
    return Manifests(text)


@pytest.fixture(scope="module")
def pod(manifests, bundle_dir, tmp_path_factory):
    """A pod whose models have been imported into a folder that was not empty, as after the loss of its sandbox."""
    folder = tmp_path_factory.mktemp("pod")
    for path in ("en-de/6", "en-de/7", "de-en/2"):
        shutil.copytree(bundle_dir, folder / "bundles" / path)
    pod = LocalPod(manifests, manifests.pods()["translate-serving"], folder, folder / "bundles")
    [importing] = pod.pod["spec"]["initContainers"]
    shutil.copytree(bundle_dir, pod.data / "models/en-de/9")
    (pod.data / "ferryman.db").write_bytes(b"left over")
    assert pod.run(importing).splitlines() == ["published en-de/1", "published en-de/2", "published de-en/1"]
    return pod


def test_its_folder_holds_what_was_imported_and_nothing_older(pod):
    assert sorted(path.name for path in (pod.data / "own" / "models" / "en-de").iterdir()) == ["1", "2"]


def test_it_starts_is_probed_translates_and_ends_in_order(pod, manifests):
    process = pod.start()
    try:
        deadline_s = time.monotonic() + START_S
        while pod.probe("startupProbe") != "SERVING":
            assert process.poll() is None
            assert time.monotonic() < deadline_s
            time.sleep(0.2)
        assert pod.probe("readinessProbe") == pod.probe("livenessProbe") == "SERVING"
        helm_test(pod, manifests)
        process.send_signal(signal.SIGTERM)
        while (status := pod.probe("readinessProbe")) == "SERVING":
            time.sleep(0.02)
        assert status == "NOT_SERVING"
        assert pod.probe("livenessProbe") == "SERVING"
        assert process.wait(timeout=pod.pod["spec"]["terminationGracePeriodSeconds"]) == 0
    finally:
        process.kill()
        process.wait()


def helm_test(pod, manifests):
    """Run both containers of `helm test` against the pod."""
    [test_pod] = manifests.all("Pod")
    serving, translate = test_pod["spec"]["containers"]
    asks = [{"translate-serving": "127.0.0.1", "50051": str(pod.port)}.get(part, part) for part in serving["args"]]
    serving["command"] = ["ferryman-service", *asks]
    assert "SERVING" in pod.run(serving)
    address = f"127.0.0.1:{pod.port}"
    translate["command"] = [address if part == "translate-serving:50051" else part for part in translate["command"]]
    assert pod.run(translate).endswith("\n")
