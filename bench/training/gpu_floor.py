"""The upper bound of a GPU: the matrix products of an update alone, and the bandwidth of its memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any, Final

import torch

from bench.peers.task import task_of
from bench.training.gpu_speed import Scale
from bench.training.matmul_floor import operands, update_shapes, with_gradients
from ferryman_service.domain.recipe import Precision, Preset

_SQUARE: Final = 8192
_COPY_BYTES: Final = 4 * 2**30
_LOGIT_ROWS: Final = 4096
_MEAN_LENGTH: Final = 27
_REPEATS: Final = 5


def measure_floor(scale: Scale, batch_target_tokens: int, device: torch.device) -> dict[str, Any]:
    """Return rates of bf16 products in the shapes of `base` and `big`, of one large square product, and of copies."""
    shrink = 64 if scale.small else 1
    copied = torch.empty(_COPY_BYTES // shrink**2, dtype=torch.uint8, device=device)
    square = torch.randn(_SQUARE // shrink, _SQUARE // shrink, device=device).bfloat16()
    copy_s = seconds_of(lambda: copied.clone(), device)
    square_s = seconds_of(lambda: square @ square, device)
    rates: dict[str, Any] = {
        "copy_gb_per_s": 2 * copied.numel() / copy_s / 1e9,
        "square_tflop_per_s": 2 * square.shape[0] ** 3 / square_s / 1e12,
    }
    for preset in (Preset.BASE, Preset.BIG):
        rates[preset] = measure_products(preset, scale, batch_target_tokens, device)
    return rates


def measure_products(preset: Preset, scale: Scale, target_tokens: int, device: torch.device) -> dict[str, float]:
    """Return the rate of an update's products, by themselves, one after the other."""
    task = task_of(scale.recipe(preset, target_tokens, Precision.BF16), target_tokens)
    sentences = max(1, target_tokens // _MEAN_LENGTH)
    seconds = operations = 0.0
    for shape in update_shapes(task, target_tokens, target_tokens, sentences, _LOGIT_ROWS):
        for product in with_gradients(shape):
            left, right, room = operands(product, device, torch.bfloat16)

            def multiply(left: Any = left, right: Any = right, room: Any = room) -> None:  # noqa: ANN401
                torch.matmul(left, right, out=room)

            seconds += product.count * seconds_of(multiply, device)
            operations += product.operations
    return {
        "tflop_per_s": operations / seconds / 1e12,
        "mflop_per_target_token": operations / target_tokens / 1e6,
        "target_tokens_per_s": target_tokens / seconds,
    }


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """Return the median seconds of a piece of work on the device, after a first time that does not count."""
    times_s: list[float] = []
    for _ in range(_REPEATS + 1):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            work()
            end.record()
            end.synchronize()
            times_s.append(begin.elapsed_time(end) / 1000)
        else:
            started_s = time.perf_counter()
            work()
            times_s.append(time.perf_counter() - started_s)
    return median(times_s[1:])
