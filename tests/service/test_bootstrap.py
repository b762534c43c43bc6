"""Where the service translates, by what it was told and what there is; how it is put together, starts and ends."""

import asyncio
import threading
import time

import pytest

from examples.local_service import reserved_port
from ferryman_service import bootstrap
from ferryman_service.application.housekeeping import Housekeeping
from ferryman_service.application.supervisor import Supervisor
from ferryman_service.bootstrap import build_service, ends_in_time, translates_on_gpu
from ferryman_service.config.resources import Machine, Usable
from ferryman_service.config.service_config import ComputeChoice, Device, Role, ServiceConfig
from ferryman_service.rpc.health import CORPORA, TRANSLATION, check_health
from ferryman_service.stores.lock import FolderInUse, FolderLock


@pytest.mark.parametrize(
    ("device", "compute_type", "on_gpu"),
    [
        (Device.AUTO, ComputeChoice.AUTO, True),
        (Device.AUTO, ComputeChoice.FP16, True),
        (Device.AUTO, ComputeChoice.INT8, False),
        (Device.AUTO, ComputeChoice.FP32, False),
        (Device.CUDA, ComputeChoice.AUTO, True),
        (Device.CUDA, ComputeChoice.FP16, True),
        (Device.CPU, ComputeChoice.AUTO, False),
        (Device.CPU, ComputeChoice.INT8, False),
    ],
)
def test_a_gpu_that_is_there_is_used_unless_something_else_was_said(device, compute_type, on_gpu):
    assert translates_on_gpu(ServiceConfig(device=device, compute_type=compute_type), lambda: True) is on_gpu


def test_without_a_gpu_auto_is_the_cpu():
    for compute_type in (ComputeChoice.AUTO, ComputeChoice.INT8, ComputeChoice.FP32):
        assert not translates_on_gpu(ServiceConfig(compute_type=compute_type), lambda: False)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"device": Device.CUDA}, "--device cuda: ONNX Runtime has no GPU here"),
        ({"device": Device.CUDA, "compute_type": ComputeChoice.FP16}, "--device cuda"),
        ({"compute_type": ComputeChoice.FP16}, "--compute-type fp16 is for CUDA"),
    ],
)
def test_a_gpu_that_was_asked_for_and_is_not_there_is_an_error(asked, words):
    with pytest.raises(OSError, match=words):
        translates_on_gpu(ServiceConfig(**asked), lambda: False)


async def test_a_service_with_a_gpu_it_has_not_does_not_start(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("CUDA is there")
    config = ServiceConfig(data_dir=tmp_path, device=Device.CUDA, roles=frozenset({Role.TRANSLATION}))
    with pytest.raises(OSError, match="--device cuda"):
        build_service(config)


@pytest.fixture
def probe_port():
    with reserved_port() as port:
        yield port


async def test_a_service_starts_on_its_ports_and_ends(tmp_path, probe_port):
    pytest.importorskip("onnxruntime")
    config = ServiceConfig(
        data_dir=tmp_path,
        port=0,
        metrics_port=0,
        probe_port=probe_port,
        drain_s=600,
        min_free_mib=2**30,
        roles=frozenset({Role.TRANSLATION}),
    )
    service = build_service(config)
    await service.start()
    assert (service.probe_port, service.metrics_port) == (probe_port, 0)
    for port in (service.port, probe_port):
        assert await asyncio.to_thread(check_health, f"127.0.0.1:{port}", TRANSLATION, 5) == "SERVING"
    async with asyncio.timeout(60):  # no disk has a pebibyte free: there is no room for uploads
        while await asyncio.to_thread(check_health, f"127.0.0.1:{probe_port}", CORPORA, 5) != "NOT_SERVING":
            await asyncio.sleep(0.1)
    for name in (TRANSLATION, ""):
        assert await asyncio.to_thread(check_health, f"127.0.0.1:{probe_port}", name, 5) == "SERVING"
    abandoned = tmp_path / "corpora" / ".incoming" / ("ab" * 16)
    abandoned.mkdir()
    [housekeeping] = [part for part in service._background if isinstance(part, Housekeeping)]
    {duty.name: duty.work for duty in housekeeping.duties}["clear away"]()
    assert not abandoned.exists()
    hurry = asyncio.Event()
    stopping = asyncio.create_task(service.stop(hurry))
    await asyncio.sleep(0.1)
    assert await asyncio.to_thread(check_health, f"127.0.0.1:{probe_port}", TRANSLATION, 5) == "NOT_SERVING"
    assert await asyncio.to_thread(check_health, f"127.0.0.1:{probe_port}", "liveness", 5) == "SERVING"
    hurry.set()
    assert await stopping, "everything has ended"


async def test_automatic_options_follow_the_machine(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    machine = Machine(cpus=Usable(value=3, source="affinity"), memory=Usable(value=3 * 2**30, source="MemTotal"))
    monkeypatch.setattr(bootstrap, "find_machine", lambda: machine)
    roles = frozenset({Role.TRANSLATION})
    service = build_service(
        ServiceConfig(data_dir=tmp_path, port=0, metrics_port=0, probe_port=0, roles=roles, device=Device.CPU)
    )
    await service.start()
    loaded, translation = service._use_cases.loaded, service._use_cases.translation
    assert loaded._loader._scheduler.threads == 3
    assert loaded._limits.memory_bytes == 3 * 2**29
    assert translation._admission.calls.limit_tokens == 3 * 131_072
    assert await service.stop(hurried())


class SlowTick:
    """A look of the supervisor that takes until it is released."""

    def __init__(self):
        self.begun, self.released, self.ended = threading.Event(), threading.Event(), threading.Event()

    def __call__(self):
        self.begun.set()
        self.released.wait(60)
        self.ended.set()


@pytest.fixture
async def ticking(tmp_path, monkeypatch):
    """A service whose supervisor is at work, and what it works on."""
    for package in ("torch", "onnx", "onnxruntime"):
        pytest.importorskip(package)
    tick = SlowTick()
    monkeypatch.setattr(Supervisor, "tick", lambda _: tick())
    roles = frozenset({Role.TRAINING})
    service = build_service(ServiceConfig(data_dir=tmp_path, port=0, metrics_port=0, probe_port=0, roles=roles))
    await service.start()
    assert await asyncio.to_thread(tick.begun.wait, 30)
    yield service, tick
    tick.released.set()


def hurried():
    hurry = asyncio.Event()
    hurry.set()
    return hurry


async def test_the_folder_is_free_when_the_supervisor_has_ended(ticking, tmp_path, monkeypatch):
    service, tick = ticking
    monkeypatch.setattr(bootstrap, "_CLOSE_S", 60)
    asyncio.get_running_loop().call_later(0.5, tick.released.set)
    assert await service.stop(hurried())
    assert tick.ended.is_set()
    lock = FolderLock(tmp_path / "training-service.lock")
    lock.acquire()
    lock.release()


async def test_a_supervisor_that_is_stuck_keeps_the_folder_until_the_process_ends(ticking, tmp_path, monkeypatch):
    service, _ = ticking
    monkeypatch.setattr(bootstrap, "_CLOSE_S", 0.1)
    assert not await service.stop(hurried())
    with pytest.raises(FolderInUse):
        FolderLock(tmp_path / "training-service.lock").acquire()


async def test_part_that_does_not_close_in_time_is_left():
    released = threading.Event()
    began_s = time.monotonic()
    assert not await ends_in_time(lambda: released.wait(30), 0.1)
    assert time.monotonic() - began_s < 5
    released.set()
    assert await ends_in_time(released.wait, 10)
