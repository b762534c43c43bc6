"""ONNX files, as far as Ferryman writes them, read without ONNX Runtime (onnx/onnx, `onnx.proto`).

Parts of the format that no exported model has are refused wherever they stand: subgraphs, and with them control flow;
functions; tensors outside the file; sparse tensors, strings, training information, metadata. The rest is a flat list of
nodes with small attributes, weights whose bytes lie in the file, inputs and outputs.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias, TypeVar

from ferryman_service.bundle.protobuf import (
    BYTES,
    FIXED32,
    VARINT,
    Field,
    MalformedMessage,
    Message,
    Values,
    read_message,
    signed,
)

FLOAT: Final = 1
UINT8: Final = 2
INT8: Final = 3
INT32: Final = 6
INT64: Final = 7
FLOAT16: Final = 10
_ITEM_BYTES: Final = {FLOAT: 4, UINT8: 1, INT8: 1, INT32: 4, INT64: 8, FLOAT16: 2}
OPSET_VERSIONS: Final = {"": 24, "com.microsoft": 1}
_IR_VERSION: Final = 11
_MOST_NODES: Final = 10_000
_MOST_INPUTS: Final = 16
_MOST_OUTPUTS: Final = 8
_MOST_ATTRIBUTES: Final = 8
_MOST_INTS: Final = 8
_MOST_DIMENSIONS: Final = 4
_MOST_VALUES: Final = 1024
_MOST_NAME_BYTES: Final = 200

_MODEL: Final = Message(
    "the model",
    {
        1: Field("ir_version", VARINT),
        2: Field("producer_name", BYTES),
        7: Field("graph", BYTES),
        8: Field("opset_import", BYTES, len(OPSET_VERSIONS)),
    },
    {14: "metadata_props", 20: "training_info", 25: "functions", 26: "device configurations"},
)
_OPSET: Final = Message("opset_import", {1: Field("domain", BYTES), 2: Field("version", VARINT)}, {})
_GRAPH: Final = Message(
    "the graph",
    {
        1: Field("node", BYTES, _MOST_NODES),
        2: Field("name", BYTES),
        5: Field("initializer", BYTES, _MOST_NODES),
        11: Field("input", BYTES, _MOST_VALUES),
        12: Field("output", BYTES, _MOST_VALUES),
    },
    {14: "quantization_annotation", 15: "sparse_initializer", 16: "metadata_props"},
)
_NODE: Final = Message(
    "a node",
    {
        1: Field("input", BYTES, _MOST_INPUTS),
        2: Field("output", BYTES, _MOST_OUTPUTS),
        3: Field("name", BYTES),
        4: Field("op_type", BYTES),
        5: Field("attribute", BYTES, _MOST_ATTRIBUTES),
        7: Field("domain", BYTES),
    },
    {8: "an overload, which calls a function", 9: "metadata_props", 10: "device configurations"},
)
_ATTRIBUTE: Final = Message(
    "an attribute",
    {
        1: Field("name", BYTES),
        2: Field("f", FIXED32),
        3: Field("i", VARINT),
        8: Field("ints", VARINT, _MOST_INTS, packs=True),
        20: Field("type", VARINT),
    },
    {4: "a text", 5: "a tensor", 6: "a subgraph", 11: "subgraphs", 21: "a reference to a function's attribute"},
)
_TENSOR: Final = Message(
    "a tensor",
    {
        1: Field("dims", VARINT, 2, packs=True),
        2: Field("data_type", VARINT),
        8: Field("name", BYTES),
        9: Field("raw_data", BYTES),
    },
    {3: "a segment", 6: "texts", 13: "external_data", 14: "a data_location outside the file"},
)
_VALUE_INFO: Final = Message("a value", {1: Field("name", BYTES), 2: Field("type", BYTES)}, {})
_TYPE: Final = Message("a type", {1: Field("tensor_type", BYTES)}, {4: "a sequence", 5: "a map", 9: "an optional"})
_TENSOR_TYPE: Final = Message("a tensor's type", {1: Field("elem_type", VARINT), 2: Field("shape", BYTES)}, {})
_SHAPE: Final = Message("a shape", {1: Field("dim", BYTES, _MOST_DIMENSIONS)}, {})
_DIMENSION: Final = Message("a dimension", {1: Field("dim_value", VARINT), 2: Field("dim_param", BYTES)}, {})

_FLOAT_ATTRIBUTE: Final = 1
_INT_ATTRIBUTE: Final = 2
_INTS_ATTRIBUTE: Final = 7

Attribute: TypeAlias = int | float | tuple[int, ...]
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class TensorType:
    """An element type and dimensions; None is a dimension of any size."""

    element_type: int
    dims: tuple[int | None, ...]


@dataclass(frozen=True)
class Node:
    """An operator, with its domain before it unless that is ONNX's own, and what it is applied to."""

    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Attribute]


@dataclass(frozen=True)
class Graph:
    """The nodes in order; constants, inputs and outputs by name."""

    nodes: tuple[Node, ...]
    constants: Mapping[str, TensorType]
    inputs: Mapping[str, TensorType]
    outputs: Mapping[str, TensorType]


def read_graph(data: memoryview) -> Graph:
    """Return the graph of an ONNX file. Raises MalformedMessage for what is none, or has parts that are refused."""
    model = read_message(data, _MODEL)
    opsets = [read_message(_bytes(opset), _OPSET) for opset in model["opset_import"]]
    versions = {_text(opset, "domain"): _number(opset, "version") for opset in opsets}
    if _number(model, "ir_version") != _IR_VERSION or versions != OPSET_VERSIONS:
        raise MalformedMessage(f"the model has IR version {_number(model, 'ir_version')} and operators of {versions}")
    graph = read_message(_only(model, "graph"), _GRAPH)
    _text(model, "producer_name"), _text(graph, "name")
    return Graph(
        nodes=tuple(_node(_bytes(node)) for node in graph["node"]),
        constants=_by_name([_constant(_bytes(tensor)) for tensor in graph["initializer"]]),
        inputs=_by_name([_value(_bytes(value)) for value in graph["input"]]),
        outputs=_by_name([_value(_bytes(value)) for value in graph["output"]]),
    )


def _node(data: memoryview) -> Node:
    values = read_message(data, _NODE)
    _text(values, "name")
    domain, operator = _text(values, "domain"), _text(values, "op_type")
    return Node(
        operator=f"{domain}.{operator}" if domain else operator,
        inputs=tuple(_name(_bytes(name)) for name in values["input"]),
        outputs=tuple(_name(_bytes(name)) for name in values["output"]),
        attributes=_by_name([_attribute(_bytes(attribute)) for attribute in values["attribute"]]),
    )


def _attribute(data: memoryview) -> tuple[str, Attribute]:
    values = read_message(data, _ATTRIBUTE)
    name, kind = _text(values, "name"), _number(values, "type")
    given = {part for part in ("f", "i", "ints") if values[part]}
    if kind == _FLOAT_ATTRIBUTE and given <= {"f"}:
        (number,) = struct.unpack("<f", _only(values, "f")) if given else (0.0,)
        if not math.isfinite(number):
            raise MalformedMessage(f"the attribute {name!r} is {number}")
        return name, float(number)
    if kind == _INT_ATTRIBUTE and given <= {"i"}:
        return name, signed(_number(values, "i"))
    if kind == _INTS_ATTRIBUTE and given <= {"ints"}:
        return name, tuple(signed(number) for number in values["ints"] if isinstance(number, int))
    raise MalformedMessage(f"the attribute {name!r} is not one number or a list of whole ones")


def _constant(data: memoryview) -> tuple[str, TensorType]:
    values = read_message(data, _TENSOR)
    name, element_type = _text(values, "name"), _number(values, "data_type")
    dims = tuple(signed(size) for size in values["dims"] if isinstance(size, int))
    if element_type not in _ITEM_BYTES or any(size < 1 for size in dims):
        raise MalformedMessage(f"the constant {name!r} has element type {element_type} and dimensions {dims}")
    promised, found = math.prod(dims) * _ITEM_BYTES[element_type], len(_only(values, "raw_data"))
    if promised != found:
        raise MalformedMessage(f"the constant {name!r} has {found} bytes, by its dimensions it has {promised}")
    return name, TensorType(element_type, dims)


def _value(data: memoryview) -> tuple[str, TensorType]:
    value = read_message(data, _VALUE_INFO)
    tensor = read_message(_only(read_message(_only(value, "type"), _TYPE), "tensor_type"), _TENSOR_TYPE)
    shape = read_message(_only(tensor, "shape"), _SHAPE)
    dims = tuple(_dimension(_bytes(dimension)) for dimension in shape["dim"])
    return _text(value, "name"), TensorType(_number(tensor, "elem_type"), dims)


def _dimension(data: memoryview) -> int | None:
    values = read_message(data, _DIMENSION)
    _text(values, "dim_param")
    if bool(values["dim_value"]) == bool(values["dim_param"]):
        raise MalformedMessage("a dimension is not either a size or a name")
    return _number(values, "dim_value") if values["dim_value"] else None


def _by_name(pairs: list[tuple[str, _Value]]) -> dict[str, _Value]:
    named = dict(pairs)
    if len(named) < len(pairs) or "" in named:
        raise MalformedMessage("a name is empty, or is given twice")
    return named


def _only(values: Values, field: str) -> memoryview:
    if not values[field]:
        raise MalformedMessage(f"{field} is missing")
    return _bytes(values[field][0])


def _bytes(value: int | memoryview) -> memoryview:
    assert isinstance(value, memoryview), "the form of the message says so"
    return value


def _number(values: Values, field: str) -> int:
    """Return a number, 0 if it is missing."""
    value = values[field][0] if values[field] else 0
    assert isinstance(value, int), "the form of the message says so"
    return value


def _text(values: Values, field: str) -> str:
    """Return a text, "" if it is missing."""
    return _name(_bytes(values[field][0])) if values[field] else ""


def _name(data: memoryview) -> str:
    if len(data) > _MOST_NAME_BYTES:
        raise MalformedMessage(f"a name has {len(data)} bytes, may have {_MOST_NAME_BYTES}")
    text = bytes(data).decode("ascii", errors="replace")
    if not (text.isascii() and text.isprintable()):
        raise MalformedMessage(f"the name {text!r} is not printable ASCII")
    return text
