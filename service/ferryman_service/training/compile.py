"""Compilation for GPUs: elementwise work between the matrix products is fused, and a layer needs few launches.

All encoder layers are the same code over other weights, and so are all decoder layers: each kind is compiled once.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from typing import Final, ParamSpec, TypeVar

import torch

from ferryman_service.model.transformer import Transformer

_C_COMPILERS: Final = ("cc", "gcc", "clang")

_Arguments = ParamSpec("_Arguments")
_Answer = TypeVar("_Answer")


def can_compile(device: torch.device) -> bool:
    """Whether compilation pays and works: on a GPU, where Triton needs a C compiler for its launchers."""
    return device.type == "cuda" and any(map(shutil.which, _C_COMPILERS))


def compile_layers(model: Transformer) -> None:
    """Compile the layers at their first use, for batches of any shape.

    What cannot be compiled runs as it is. For a while that can be had on purpose: torch.compiler.set_stance.
    """
    for layer in (*model.encoder_layers, *model.decoder_layers):
        layer.compile(dynamic=True)


@cache
def fused(function: Callable[_Arguments, _Answer], device_type: str) -> Callable[_Arguments, _Answer]:
    """Return the function; on a GPU, one that does its elementwise work and its reductions in few passes."""
    if can_compile(torch.device(device_type)):
        return torch.compile(function)
    return function
