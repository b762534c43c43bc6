"""Where the service translates, by what it was told and what there is; how it is put together, starts and ends."""

import asyncio
import socket
import threading
import time

import pytest

from ferryman_service.bootstrap import build_service, ends_in_time, translates_on_gpu
from ferryman_service.config.service_config import ComputeChoice, Device, Role, ServiceConfig
from ferryman_service.rpc.health import TRANSLATION, check_health


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


async def test_a_service_starts_on_its_ports_and_ends(tmp_path):
    pytest.importorskip("onnxruntime")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        probe_port = taken.getsockname()[1]
    config = ServiceConfig(
        data_dir=tmp_path,
        port=0,
        metrics_port=0,
        probe_port=probe_port,
        drain_s=600,
        roles=frozenset({Role.TRANSLATION}),
    )
    service = build_service(config)
    await service.start()
    assert (service.probe_port, service.metrics_port) == (probe_port, 0)
    for port in (service.port, probe_port):
        assert await asyncio.to_thread(check_health, f"127.0.0.1:{port}", TRANSLATION, 5) == "SERVING"
    hurry = asyncio.Event()
    stopping = asyncio.create_task(service.stop(hurry))
    await asyncio.sleep(0.1)
    assert await asyncio.to_thread(check_health, f"127.0.0.1:{probe_port}", TRANSLATION, 5) == "NOT_SERVING"
    assert await asyncio.to_thread(check_health, f"127.0.0.1:{probe_port}", "liveness", 5) == "SERVING"
    hurry.set()
    assert await stopping, "everything has ended"


async def test_what_does_not_close_in_time_is_left():
    released = threading.Event()
    began_s = time.monotonic()
    assert not await ends_in_time(lambda: released.wait(30), 0.1)
    assert time.monotonic() - began_s < 5
    released.set()
    assert await ends_in_time(released.wait, 10)
