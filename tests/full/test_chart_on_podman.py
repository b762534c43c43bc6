"""The chart's pods, from its rendered manifests, run by podman: what a kubelet does with them, but for the cluster."""

import time

import pytest
import yaml

from ferryman import Client
from ferryman_service.rpc.health import check_health
from tests.full.conftest import MODEL, SENTENCES, start_ten_steps, wait_for_success
from tests.full.containers import REPOSITORY, START_S, Container, free_port
from tests.ops.rendered_chart import Manifests, main_container, template

pytestmark = pytest.mark.full

PLAYED = {"ConfigMap", "PersistentVolumeClaim", "Deployment"}
# Podman knows no cluster: no addresses, no accounts, no rules of the network.
LEFT_OUT = {"Service", "ServiceAccount", "NetworkPolicy"}
PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
MIB = 2**20
COMPONENTS = {"controlPlane": "control", "serving": "serving"}
IMAGES = {"controlPlane": "cpu", "serving": "serving-cpu"}
MEMORY_MIB = {"controlPlane": 1500, "serving": 600}


def settings(ports):
    """Return values for one machine: images that are there, loopback, and limits that fit."""
    values = {
        "image.repository": REPOSITORY,
        "image.pullPolicy": "Never",
        "bindAddress": "127.0.0.1",
        "serving.replicas": 1,
        "shutdown.drainSeconds": 1,
        "persistence.size": "1Gi",
        **{f"ports.{name}": port for name, port in ports.items()},
    }
    for component, tag in IMAGES.items():
        values[f"{component}.image.tag"] = tag
        values[f"{component}.resources.requests.memory"] = f"{MEMORY_MIB[component]}Mi"
        values[f"{component}.resources.limits.memory"] = f"{MEMORY_MIB[component]}Mi"
        values[f"{component}.resources.requests.cpu"] = "500m"
        # A string, as Kubernetes wants it.
        values[f"{component}.resources.limits.cpu"] = "1000m"
    return [part for name, value in values.items() for part in ("--set", f"{name}={value}")]


class Pod(Container):
    """A pod of one Deployment, played by podman, on ports of its own."""

    def __init__(self, engine, helm, component):
        self.ports = {name: free_port() for name in ("grpc", "probe", "metrics")}
        code, text, errors = template(helm, *settings(self.ports))
        assert code == 0, errors
        manifests = Manifests(text)
        self.kinds = {each["kind"] for each in manifests.objects if not is_hook(each)}
        self.deployment = manifests.one("Deployment", f"-{COMPONENTS[component]}")
        self.volumes = [each["metadata"]["name"] for each in manifests.all("PersistentVolumeClaim")]
        self.probes = {name: main_container(self._template())[name]["grpc"] for name in PROBES}
        self.memory_bytes = MEMORY_MIB[component] * MIB
        self.file = engine.folder / f"{component}.yaml"
        self.file.write_text(yaml.safe_dump_all(self._playable(manifests, makes_claims=component == "controlPlane")))
        engine.podman("play", "kube", self.file)
        # Podman's name of a Deployment's only pod, and of a container in it.
        self.pod = f"{self.deployment['metadata']['name']}-pod-0"
        super().__init__(engine, f"{self.pod}-{main_container(self._template())['name']}")

    def _template(self):
        return self.deployment["spec"]["template"]

    def _playable(self, manifests, makes_claims):
        """Return the objects that podman knows, with the host's network, on which no port can be published."""
        pod = self._template()
        pod["spec"]["hostNetwork"] = True
        for container in pod["spec"]["containers"]:
            del container["ports"]
        # The claim is played once: podman makes no volume that is there already.
        kinds = PLAYED - {"Deployment"} - (set() if makes_claims else {"PersistentVolumeClaim"})
        others = [each for each in manifests.objects if each["kind"] in kinds]
        return [*others, self.deployment]

    @property
    def address(self):
        return f"127.0.0.1:{self.ports['grpc']}"

    def probe(self, name):
        """Ask as the kubelet would; podman runs no probes of gRPC."""
        probe = self.probes[name]
        return check_health(f"127.0.0.1:{probe['port']}", probe["service"], 5)

    def wait_until_started(self):
        deadline_s = time.monotonic() + START_S
        while self.probe("startupProbe") != "SERVING":
            assert self.engine.inspect(self.name)["State"]["Running"], self.log()
            assert time.monotonic() < deadline_s, self.log()
            time.sleep(0.2)


def is_hook(manifest):
    return "helm.sh/hook" in manifest["metadata"].get("annotations", {})


@pytest.fixture(scope="module")
def pods(engine, images, helm_and_kubectl):
    """Both pods of the release, on one volume; the control plane first, since it makes the database."""
    started = {}
    try:
        for component in COMPONENTS:
            started[component] = Pod(engine, helm_and_kubectl[0], component)
            started[component].wait_until_started()
        yield started
    finally:
        for pod in started.values():
            engine.podman("play", "kube", "--down", pod.file)
        for volume in {name for pod in started.values() for name in pod.volumes}:
            engine.podman("volume", "rm", volume)


@pytest.fixture(params=COMPONENTS)
def pod(request, pods):
    return pods[request.param]


@pytest.fixture(scope="module")
def published(pods):
    with Client(pods["controlPlane"].address) as client:
        wait_for_success(client, start_ten_steps(client))


def test_only_kinds_of_the_cluster_are_left_out(pod):
    assert pod.kinds - PLAYED == LEFT_OUT


@pytest.mark.parametrize("probe", PROBES)
def test_probes_pass(pod, probe):
    assert pod.probe(probe) == "SERVING"


def test_containers_are_as_confined_as_the_manifests_say(pod):
    known = pod.engine.inspect(pod.name)
    assert known["HostConfig"]["ReadonlyRootfs"]
    assert known["EffectiveCaps"] in (None, [])
    assert known["HostConfig"]["Memory"] == pod.memory_bytes
    assert pod.execute("id", "-u").stdout.strip() == "10001"
    assert pod.execute("touch", "/opt/ferryman/x").returncode != 0


def test_one_cpu_is_what_the_pods_use(pod):
    assert pod.usable_cpus() == 1


def test_files_of_the_volume_give_nothing_to_other_users(pod, published):
    """The group may have what the fsGroup of the pods gives it."""
    found = pod.execute("find", "/data", "-mindepth", "1", "-perm", "/0007", "!", "-type", "l")
    assert (found.returncode, found.stdout) == (0, "")


def test_promoted_model_translates_in_the_serving_pod(pods, published):
    with Client(pods["controlPlane"].address) as control, Client(pods["serving"].address) as serving:
        control.set_model_alias(MODEL, "production", 1)
        answer = serving.translate(f"{MODEL}@production", SENTENCES)
    assert len(answer.translations) == len(SENTENCES)
    assert answer.model == f"{MODEL}/1"


def test_sigterm_ends_the_pods_with_exit_code_0(pod):
    grace_s = pod.deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    pod.engine.podman("pod", "stop", "--time", str(grace_s), pod.pod)
    assert pod.exit_code() == 0
