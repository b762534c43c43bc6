"""Where the service translates, by what it was told and what there is."""

import pytest

from ferryman_service.bootstrap import build_service, translates_on_gpu
from ferryman_service.config.service_config import ComputeChoice, Device, Role, ServiceConfig


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
