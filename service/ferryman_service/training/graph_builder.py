"""Writes an ONNX graph node by node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

OPSET_VERSION: Final = 24
IR_VERSION: Final = 11
CONTRIB: Final = "com.microsoft"
"""ONNX Runtime's own operators."""
PRODUCER: Final = "ferryman"

_ELEMENT_TYPES: Final = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "int64": TensorProto.INT64,
    "int32": TensorProto.INT32,
}


OMITTED: Final = "omitted"
"""Stands for an optional output that nobody wants."""

Attribute: TypeAlias = int | float | list[int]


class GraphBuilder:
    """Collects nodes, weights, inputs and outputs. Values are named by their order, so equal calls make equal files."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: list[onnx.TensorProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def input(self, name: str, element_type: str, shape: Sequence[str | int]) -> str:
        """Declare an input; a string in the shape is a dimension of any size."""
        self._inputs.append(helper.make_tensor_value_info(name, _ELEMENT_TYPES[element_type], list(shape)))
        return name

    def output(self, name: str, element_type: str, shape: Sequence[str | int]) -> None:
        """Declare that the value of this name is an output."""
        self._outputs.append(helper.make_tensor_value_info(name, _ELEMENT_TYPES[element_type], list(shape)))

    def constant(self, value: NDArray[Any] | Sequence[int]) -> str:
        """Return the name of a constant: an array, or int64 numbers. Equal small ones are stored once."""
        array = value if isinstance(value, np.ndarray) else np.array(value, np.int64)
        key = (str(array.dtype), array.shape, array.tobytes() if array.size <= 64 else b"")
        if array.size <= 64 and key in self._constants:
            return self._constants[key]
        name = f"constant_{len(self._initializers)}"
        self._initializers.append(numpy_helper.from_array(array, name))
        if array.size <= 64:
            self._constants[key] = name
        return name

    def cast(self, value: str, element_type: str, *, name: str = "") -> str:
        """Return the value in another element type."""
        return self.node("Cast", [value], name=name, to=_ELEMENT_TYPES[element_type])

    def node(
        self, operator: str, inputs: Sequence[str], *, name: str = "", domain: str = "", **attributes: Attribute
    ) -> str:
        """Add a node with one output and return the output's name: `name`, or one that is made up."""
        (output,) = self.nodes(operator, inputs, [name], domain=domain, **attributes)
        return output

    def nodes(
        self, operator: str, inputs: Sequence[str], outputs: Sequence[str], *, domain: str = "", **attributes: Attribute
    ) -> list[str]:
        """Add a node with several outputs and return their names; an empty one is made up, OMITTED is not computed."""
        number = len(self._nodes)
        names = [output or f"{operator}_{number}_{index}" for index, output in enumerate(outputs)]
        names = ["" if name == OMITTED else name for name in names]
        node = helper.make_node(operator, list(inputs), names, f"{operator}_{number}", domain=domain)
        node.attribute.extend(helper.make_attribute(name, value) for name, value in sorted(attributes.items()))
        self._nodes.append(node)
        return names

    def build(self) -> onnx.ModelProto:
        """Return the checked model."""
        graph = helper.make_graph(self._nodes, self._name, self._inputs, self._outputs, self._initializers)
        opsets = [helper.make_opsetid("", OPSET_VERSION), helper.make_opsetid(CONTRIB, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name=PRODUCER)
        onnx.checker.check_model(model)
        return model
