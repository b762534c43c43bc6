"""Compilation for GPUs: elementwise work between the matrix products is fused, and a layer needs few launches.

Only training is compiled. Validation and decoding have other shapes and types, for each of which the compiler would
start again; they run as they are, and so does everything once `stop_compiling` was called.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from functools import cache
from typing import Any, Final, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from ferryman_service.domain.records import EventLevel
from ferryman_service.model.transformer import Transformer

SETTINGS: Final = ("auto", "on", "off")

_C_COMPILERS: Final = ("gcc", "clang")  # those that Triton looks for
_LONGEST_REASON: Final = 300

_Arguments = ParamSpec("_Arguments")
_Answer = TypeVar("_Answer")


def what_hinders(device: torch.device) -> str:
    """Return why compilation would not pay or not work on the device; "" if nothing is known against it."""
    if device.type != "cuda":
        return "only a GPU gains from it"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not any(map(shutil.which, _C_COMPILERS)):
        return f"Triton finds no C compiler ({' or '.join(_C_COMPILERS)})"
    return ""


def choose_attention(device: torch.device) -> None:
    """Choose the kernels of attention, for the whole process.

    cuDNN's are the first choice of PyTorch on some GPUs, and plan anew for every shape that they meet; with them
    updates took several times as long (docs/lab-log.md), for batches of text have a new shape each. Flash and
    memory-efficient attention take any.
    """
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)


def set_up_compilation(model: Transformer, setting: str, device: torch.device) -> bool:
    """Compile the layers if the setting, one of SETTINGS, wants it; return whether they are compiled.

    Changes torch's stance for the whole process.
    """
    if setting == "on" or (setting == "auto" and not what_hinders(device)):
        torch.compiler.set_stance("default")
        compile_layers(model)
        return True
    if device.type == "cuda":
        stop_compiling()
    return False


def compilation_remark(compiled: bool, setting: str, device: torch.device) -> tuple[EventLevel, str, str] | None:
    """Return an event that says whether the layers are compiled; None where nobody expects it, on a CPU."""
    if compiled:
        text = "the layers are compiled at the first updates, which take a minute or so longer for it"
        return EventLevel.INFO, "LAYERS_COMPILED", text
    if device.type == "cuda":
        reason = what_hinders(device) or f'the engine was set up with compilation "{setting}"'
        return EventLevel.INFO, "LAYERS_NOT_COMPILED", f"the layers run uncompiled, which is slower: {reason}"
    return None


def compile_layers(model: Transformer) -> None:
    """Let the layers be compiled at their first use in training, for batches of any shape.

    All encoder layers are the same code over other weights, and so are all decoder layers: each kind is compiled once.
    The names of the weights stay as they are.
    """
    for layers in (model.encoder_layers, model.decoder_layers):
        compiled = torch.compile(type(layers[0]).forward, dynamic=True)
        for layer in layers:
            object.__setattr__(layer, "forward", _in_training(compiled, layer))


def _in_training(compiled: Callable[..., Tensor], layer: nn.Module) -> Callable[..., Tensor]:
    plain = type(layer).forward

    def forward(*inputs: Any) -> Tensor:  # noqa: ANN401 (those of a layer of either kind)
        answer: Tensor = (compiled if layer.training else plain)(layer, *inputs)
        return answer

    return forward


def stop_compiling() -> None:
    """Run everything as it is from now on, also what was compiled before."""
    torch.compiler.set_stance("force_eager")


def reason_of(error: Exception) -> str:
    """Return a line that says why compiled code failed: the compiler's own words are pages."""
    line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {line}"[:_LONGEST_REASON]


@cache
def fused(function: Callable[_Arguments, _Answer], device_type: str) -> Callable[_Arguments, _Answer]:
    """Return the function; on a GPU, one that in training does its elementwise work and its sums in few passes."""
    if what_hinders(torch.device(device_type)):
        return function
    compiled = torch.compile(function)

    def run(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Answer:
        return (function if torch.is_inference_mode_enabled() else compiled)(*args, **kwargs)

    return run
