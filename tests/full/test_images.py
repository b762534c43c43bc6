"""The images, built and run: one trains and publishes, the other translates, both within limits of CPU and memory."""

import os
import time
from dataclasses import dataclass

import pytest

from ferryman import Client
from ferryman_service.rpc.health import TRAINING, TRANSLATION, check_health
from tests.full.conftest import MODEL, SENTENCES, STEPS, TARGETS, start_ten_steps, wait_for_success
from tests.full.containers import START_S, STOP_S, Container, Limits, ServiceContainer

pytestmark = pytest.mark.full

USER = 10001
LIMITS = {"cpu": Limits(cpus=1, memory="1500m"), "serving-cpu": Limits(cpus=1, memory="600m")}
WRITABLE = ("/data", "/tmp")


@dataclass
class Training:
    """A service that has trained: the run, and the environment of its worker."""

    container: ServiceContainer
    run: object
    worker_environment: dict[str, str]


def train(container):
    with Client(container.address) as client:
        run = start_ten_steps(client)
        environment = environment_of_worker(container)
        return Training(container, wait_for_success(client, run), environment)


def environment_of_worker(container):
    """Return the environment of the first worker that appears."""
    deadline_s = time.monotonic() + START_S
    while time.monotonic() < deadline_s:
        for process in container.processes():
            try:
                command, variables = ((process / name).read_bytes().split(b"\0") for name in ("cmdline", "environ"))
            except (FileNotFoundError, ProcessLookupError):
                continue
            if b"ferryman_service.worker" in command:
                return dict(variable.decode().split("=", 1) for variable in variables if variable)
        time.sleep(0.02)
    raise AssertionError(f"no worker has started:\n{container.log()}")


@pytest.fixture(scope="module")
def volume(engine):
    return engine.podman("volume", "create").strip()


@pytest.fixture(scope="module")
def training(engine, images, volume):
    return train(ServiceContainer(engine, images["cpu"], volume, LIMITS["cpu"]))


@pytest.fixture(scope="module")
def serving(engine, images, volume, training):
    """A container of the image without torch, on the data folder of the one that has trained."""
    return ServiceContainer(engine, images["serving-cpu"], volume, LIMITS["serving-cpu"])


@pytest.fixture(scope="module")
def containers(training, serving):
    return {"cpu": training.container, "serving-cpu": serving}


@pytest.fixture(params=TARGETS)
def container(request, containers):
    return containers[request.param]


@pytest.fixture(scope="module")
def unlimited(engine, images):
    """A container that has trained without a limit of CPUs and with a writable root."""
    volume = engine.podman("volume", "create").strip()
    limits = Limits(cpus=None, memory="1500m")
    return train(ServiceContainer(engine, images["cpu"], volume, limits, read_only=False))


def translations(container):
    with Client(container.address) as client:
        return [each.text for each in client.translate(MODEL, SENTENCES).translations]


def test_cpu_image_trains_and_publishes(training):
    assert training.run.progress.step == STEPS
    with Client(training.container.address) as client:
        assert client.get_model(f"{MODEL}/1").version.run_id == training.run.run_id


def test_serving_image_translates_with_the_published_model(containers):
    by_image = {name: translations(container) for name, container in containers.items()}
    assert len(by_image["serving-cpu"]) == len(SENTENCES)
    assert by_image["serving-cpu"] == by_image["cpu"]


def test_serving_image_holds_no_torch(serving):
    assert serving.execute("python", "-c", "import onnxruntime").returncode == 0
    assert "No module named 'torch'" in serving.execute("python", "-c", "import torch").stderr


def test_health_check_of_the_image_passes(container):
    checked = container.engine.try_podman("healthcheck", "run", container.name)
    assert checked.returncode == 0, checked


def test_health_tells_the_roles_of_each_image(containers):
    status = {
        name: [check_health(f"127.0.0.1:{each.probe_port}", service, 5) for service in (TRAINING, TRANSLATION)]
        for name, each in containers.items()
    }
    assert status == {"cpu": ["SERVING", "SERVING"], "serving-cpu": ["NOT_SERVING", "SERVING"]}


def test_metrics_count_steps_and_sentences(containers):
    before = {name: value_of(container, "ferryman_translate_sentences_total") for name, container in containers.items()}
    translations(containers["serving-cpu"])
    after = {name: value_of(container, "ferryman_translate_sentences_total") for name, container in containers.items()}
    assert after["serving-cpu"] == before["serving-cpu"] + len(SENTENCES)
    assert after["cpu"] == before["cpu"]
    assert value_of(containers["cpu"], "ferryman_training_steps_total") == STEPS


def value_of(container, metric):
    [line] = [line for line in container.metrics().splitlines() if line.startswith(f"{metric} ")]
    return float(line.split()[1])


def test_every_process_runs_as_10001_without_capabilities(container):
    seen = [status_of(process) for process in container.processes()]
    assert len(seen) >= 2, "tini and the service"
    for status in seen:
        assert {*status["Uid"].split(), *status["Gid"].split()} == {str(USER)}, status
        assert status["NoNewPrivs"] == "1"
        assert {int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}


def status_of(process):
    lines = (process / "status").read_text().splitlines()
    return {name: value.strip() for name, value in (line.split(":", 1) for line in lines)}


def test_one_cpu_gives_one_thread(training, serving):
    assert training.worker_environment["OMP_NUM_THREADS"] == "1"
    assert [each.usable_cpus() for each in (training.container, serving)] == [1, 1]


def test_no_limit_gives_a_thread_for_every_cpu(unlimited):
    cpus = len(os.sched_getaffinity(0))
    assert unlimited.worker_environment["OMP_NUM_THREADS"] == str(cpus)
    assert unlimited.container.usable_cpus() == cpus


def test_root_of_the_containers_is_read_only(container):
    for folder in ("/", "/opt/ferryman", "/run", "/var/tmp"):
        assert container.execute("touch", f"{folder}/x").returncode != 0, folder
    for folder in WRITABLE:
        assert container.execute("sh", "-c", f"touch {folder}/x && rm {folder}/x").returncode == 0, folder


def test_nothing_is_written_outside_of_data_and_tmp(engine, images, unlimited):
    """Where it could: the root of this container is not read-only."""
    container = unlimited.container
    translations(container)
    assert changes(engine, container) == changes_of_the_runtime(engine, images["serving-cpu"])
    assert container.execute("ls", "-A", "/dev/shm").stdout == ""


def changes_of_the_runtime(engine, image):
    """Return what podman itself changes in a container that does nothing."""
    name = engine.podman("run", "--detach", "--network", "host", "--entrypoint", "sleep", image, "60").strip()
    found = changes(engine, Container(engine, name))
    engine.podman("rm", "--force", "--time", "0", name)
    return found


def changes(engine, container):
    entries = [tuple(line.split(" ", 1)) for line in engine.podman("diff", container.name).splitlines()]
    return {(kind, path) for kind, path in entries if not f"{path}/".startswith(tuple(f"{each}/" for each in WRITABLE))}


def test_nobody_but_the_service_can_read_its_data(container):
    found = container.execute("find", "/data", "-perm", "/0007", "!", "-type", "l")
    assert (found.returncode, found.stdout) == (0, "")


def test_sigterm_ends_the_service_with_exit_code_0(container):
    begin_s = time.monotonic()
    assert container.stop() == 0
    assert time.monotonic() - begin_s < STOP_S
    assert not container.engine.inspect(container.name)["State"]["OOMKilled"]
