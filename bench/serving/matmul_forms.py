"""Graphs of one matrix product with random weights, in several forms: float32, and 8-bit by every operator that ONNX
Runtime has for it.

Shape suffixes: M rows, K width in, N width out, B blocks of K.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

_MICROSOFT: Final = "com.microsoft"
_OPSET: Final = 21
_IR_VERSION: Final = 10
_ACTIVATION_SCALE: Final = 0.03
_ZERO_POINT: Final = 128

Floats = NDArray[np.float32]
Parts = tuple[list[onnx.NodeProto], dict[str, NDArray[Any]]]
"""Nodes, and the arrays that they name."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """A way to compute y_MN = x_MK @ weights_KN: what makes its nodes, and the types of x and y."""

    parts: Callable[[Floats], Parts]
    takes: int = TensorProto.FLOAT
    gives: int = TensorProto.FLOAT


def product_graph(form: Form, width_in: int, width_out: int) -> onnx.ModelProto:
    """Return the graph, x to y."""
    weights_KN = np.random.default_rng(0).standard_normal((width_in, width_out)).astype(np.float32)
    nodes, arrays = form.parts(weights_KN)
    graph = helper.make_graph(
        nodes,
        "product",
        [helper.make_tensor_value_info("x", form.takes, ["M", width_in])],
        [helper.make_tensor_value_info("y", form.gives, ["M", width_out])],
        [numpy_helper.from_array(values, name) for name, values in arrays.items()],
    )
    opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid(_MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION)


def product_input(form: Form, rows: int, width_in: int) -> NDArray[Any]:
    """Return x_MK in the form's type."""
    x_MK = np.random.default_rng(0).standard_normal((rows, width_in)).astype(np.float32)
    types: dict[int, tuple[int, type[np.uint8 | np.int8]]] = {
        TensorProto.UINT8: (_ZERO_POINT, np.uint8),
        TensorProto.INT8: (0, np.int8),
    }
    if form.takes not in types:
        return x_MK
    zero_point, kind = types[form.takes]
    limits = np.iinfo(kind)
    quantised_MK: NDArray[Any] = np.clip(x_MK / _ACTIVATION_SCALE + zero_point, limits.min, limits.max).astype(kind)
    return quantised_MK


def _quantised(weights_KN: Floats) -> tuple[NDArray[np.int8], Floats]:
    """Return weights in 8 bits, -127 to 127, and the scale of each column."""
    scale_N = (np.abs(weights_KN).max(0) / 127).astype(np.float32)
    return np.round(weights_KN / scale_N).astype(np.int8), scale_N


def _float32(weights_KN: Floats) -> Parts:
    return [helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": weights_KN}


def _float16(weights_KN: Floats) -> Parts:
    nodes = [
        helper.make_node("Cast", ["x"], ["x16"], to=TensorProto.FLOAT16),
        helper.make_node("MatMul", ["x16", "w"], ["y16"]),
        helper.make_node("Cast", ["y16"], ["y"], to=TensorProto.FLOAT),
    ]
    return nodes, {"w": weights_KN.astype(np.float16)}


def _n_bits(block: int) -> Callable[[Floats], Parts]:
    def parts(weights_KN: Floats) -> Parts:
        width_in, width_out = weights_KN.shape
        blocks_NBK = weights_KN.T.reshape(width_out, -1, block)
        scale_NB = (np.abs(blocks_NBK).max(-1) / 127).astype(np.float32)
        quantised = np.round(blocks_NBK / scale_NB[..., None]) + _ZERO_POINT
        node = helper.make_node(
            "MatMulNBits",
            ["x", "w", "scale"],
            ["y"],
            domain=_MICROSOFT,
            K=width_in,
            N=width_out,
            bits=8,
            block_size=block,
            accuracy_level=4,  # 8-bit activations, scaled per row and block
        )
        return [node], {"w": quantised.clip(0, 255).astype(np.uint8), "scale": scale_NB}

    return parts


def _dynamic(weights_KN: Floats) -> Parts:
    quantised_KN, scale_N = _quantised(weights_KN)
    node = helper.make_node("DynamicQuantizeMatMul", ["x", "w", "scale"], ["y"], domain=_MICROSOFT)
    return [node], {"w": quantised_KN, "scale": scale_N}


def _integer_u8s8(weights_KN: Floats) -> Parts:
    node = helper.make_node("MatMulInteger", ["x", "w", "x_zero"], ["y"])
    return [node], {"w": _quantised(weights_KN)[0], "x_zero": np.array(_ZERO_POINT, np.uint8)}


def _integer_s8s8(weights_KN: Floats) -> Parts:
    return [helper.make_node("MatMulInteger", ["x", "w"], ["y"])], {"w": _quantised(weights_KN)[0]}


def _integer_u8u8(weights_KN: Floats) -> Parts:
    shifted_KN = (_quantised(weights_KN)[0].astype(np.int16) + _ZERO_POINT).astype(np.uint8)
    zero = np.array(_ZERO_POINT, np.uint8)
    node = helper.make_node("MatMulInteger", ["x", "w", "x_zero", "w_zero"], ["y"])
    return [node], {"w": shifted_KN, "x_zero": zero, "w_zero": zero}


def _qgemm(weights_KN: Floats) -> Parts:
    quantised_KN, scale_N = _quantised(weights_KN)
    arrays: dict[str, NDArray[Any]] = {
        "x_scale": np.array(_ACTIVATION_SCALE, np.float32),
        "x_zero": np.array(_ZERO_POINT, np.uint8),
        "w": quantised_KN,
        "w_scale": scale_N,
        "w_zero": np.zeros(len(scale_N), np.int8),
        "bias": np.zeros(len(scale_N), np.int32),
    }
    quantise = helper.make_node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["x8"])
    gemm = helper.make_node("QGemm", ["x8", *arrays], ["y"], domain=_MICROSOFT)
    return [quantise, gemm], arrays


FORMS: Final[Mapping[str, Form]] = {
    "MatMul float32": Form(parts=_float32),
    "MatMulNBits 8 bits, blocks of 32": Form(parts=_n_bits(32)),
    "MatMulNBits 8 bits, blocks of 128": Form(parts=_n_bits(128)),
    "DynamicQuantizeMatMul": Form(parts=_dynamic),
    "MatMulInteger uint8 x int8": Form(parts=_integer_u8s8, takes=TensorProto.UINT8, gives=TensorProto.INT32),
    "MatMulInteger int8 x int8": Form(parts=_integer_s8s8, takes=TensorProto.INT8, gives=TensorProto.INT32),
    "MatMulInteger uint8 x uint8": Form(parts=_integer_u8u8, takes=TensorProto.UINT8, gives=TensorProto.INT32),
    "QuantizeLinear, QGemm": Form(parts=_qgemm),
    "MatMul float16": Form(parts=_float16),
}
