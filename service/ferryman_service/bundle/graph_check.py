"""Whether a bundle's graphs are of the kind that export writes, before ONNX Runtime is given them.

A graph is a program. This one may use the operators of `training/graphs.py`, `training/int8.py` and `training/fp16.py`
alone, with their attributes; it takes and gives what `bundle/graph_io.py` says for the architecture in the manifest; it
has no more nodes than the layers need; and what attention kernels are told of lengths comes from its inputs, so that no
number in the file makes a kernel read beyond a buffer.

A test exports networks of every kind and has them examined: an operator that export begins to use is added to the
tables.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ferryman_service.bundle import graph_io
from ferryman_service.bundle.files import open_regular
from ferryman_service.bundle.manifest import (
    DECODER_FP16_FILE,
    DECODER_INT8_FILE,
    ENCODER_FP16_FILE,
    ENCODER_INT8_FILE,
    FP16_FILES,
    REORDER_FILE,
    Architecture,
    Manifest,
    ManifestHeader,
    graph_files,
)
from ferryman_service.bundle.onnx_graph import FLOAT, FLOAT16, INT32, INT64, Graph, Node, TensorType, read_graph
from ferryman_service.bundle.protobuf import MalformedMessage
from ferryman_service.bundle.sizes import MOST_PADDING
from ferryman_service.domain.errors import ModelDamaged
from ferryman_service.domain.translation import ComputeType

_MULTI_HEAD: Final = "com.microsoft.MultiHeadAttention"
_GROUP_QUERY: Final = "com.microsoft.GroupQueryAttention"
_ATTENTION: Final = "Attention"
_ROTARY: Final = "RotaryEmbedding"

_ATTRIBUTES: Final[Mapping[str, frozenset[str]]] = {
    operator: frozenset(names)
    for operator, names in {
        "Add": (),
        _ATTENTION: ("qk_matmul_output_mode",),
        "Cast": ("to",),
        "Concat": ("axis",),
        "Div": (),
        "Gather": ("axis",),
        "GatherElements": ("axis",),
        "GatherND": ("batch_dims",),
        "Gelu": (),
        "Gemm": (),
        "LayerNormalization": ("axis", "epsilon"),
        "Less": (),
        "LogSoftmax": ("axis",),
        "MatMul": (),
        "Mul": (),
        "QuantizeLinear": (),
        "ReduceMax": ("keepdims",),
        "Relu": (),
        "Reshape": (),
        _ROTARY: ("interleaved", "num_heads", "rotary_embedding_dim"),
        "Shape": (),
        "Sigmoid": (),
        "Softmax": ("axis",),
        "Split": ("axis", "num_outputs"),
        "Sub": (),
        "TopK": ("axis", "largest", "sorted"),
        "Transpose": ("perm",),
        "Unsqueeze": (),
        "Where": (),
        _GROUP_QUERY: ("kv_num_heads", "num_heads", "scale"),
        _MULTI_HEAD: ("mask_filter_value", "num_heads"),
        "com.microsoft.QGemm": (),
        "com.microsoft.SkipLayerNormalization": ("epsilon",),
    }.items()
}
"""The attributes of each operator that export writes."""

_INPUTS: Final = {_MULTI_HEAD: 5, _GROUP_QUERY: 7, _ATTENTION: 7, _ROTARY: 4, "TopK": 2}
"""How many inputs these have; further ones would say where kernels read."""
_NAMED_INPUTS: Final[Mapping[str, Mapping[int, str]]] = {
    _MULTI_HEAD: {4: graph_io.SOURCE_LENGTHS},
    _GROUP_QUERY: {5: graph_io.PAST_LENGTHS, 6: graph_io.TOTAL_LENGTH},
    _ROTARY: {3: graph_io.POSITIONS},
    "TopK": {1: graph_io.K},
}

_NETWORK: Final = frozenset(
    f"Add Gelu LayerNormalization MatMul Mul Relu Reshape {_ROTARY} Sigmoid Split Transpose {_MULTI_HEAD}".split()
)
_STEP: Final = _NETWORK | frozenset(f"Cast LogSoftmax TopK Unsqueeze {_GROUP_QUERY}".split())
_CPU_PRODUCTS: Final = frozenset(["Gemm", "QuantizeLinear", "Shape", "com.microsoft.QGemm"])
_CPU_HEAD: Final = frozenset(f"{_ATTENTION} Div GatherElements GatherND ReduceMax Sub".split())
_GPU_HEAD: Final = frozenset(["Concat", "Less", "Softmax", "Where"])
_SKIP: Final = "com.microsoft.SkipLayerNormalization"
_NODES_PER_LAYER: Final = 64
_OTHER_NODES: Final = 128
_EXPECTED_SHAPE: Final = TensorType(INT64, (3,))


@dataclass(frozen=True)
class _Form:
    """What a graph must be: its operators, how many nodes it may have, its inputs, its outputs. `rotations` is how many
    positions the tables of rotations have."""

    operators: frozenset[str]
    most_nodes: int
    inputs: Mapping[str, TensorType]
    outputs: Mapping[str, TensorType]
    architecture: Architecture
    rotations: int = 0


def check_graphs(bundle: Path, manifest: Manifest, compute_types: Sequence[ComputeType] = tuple(ComputeType)) -> None:
    """Check the graphs of those compute types that the bundle has. Raises ModelDamaged naming the file."""
    for compute_type in compute_types:
        files = graph_files(compute_type)
        names = [files.encoder, files.decoder, *([REORDER_FILE] if compute_type is ComputeType.FP16 else [])]
        for name in names:
            if name in manifest.files:
                _check_file(bundle / name, _form_of(name, manifest.header))


def _check_file(path: Path, form: _Form) -> None:
    try:
        with open_regular(path) as file:
            mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        check_graph(read_graph(memoryview(mapped)), form)
    except ValueError as error:
        raise ModelDamaged(f"{path.name} cannot be loaded: {error}", file=path.name) from error


def check_graph(graph: Graph, form: _Form) -> None:
    """Raise MalformedMessage if the graph is not of the form."""
    _check_values("input", graph.inputs, form.inputs)
    _check_values("output", graph.outputs, form.outputs)
    if max(len(graph.nodes), len(graph.constants)) > form.most_nodes:
        found = f"{len(graph.nodes)} nodes and {len(graph.constants)} constants"
        raise MalformedMessage(f"the graph has {found}, its layers need at most {form.most_nodes}")
    makers = {output: node for node in graph.nodes for output in node.outputs if output}
    for node in graph.nodes:
        _check_operator(node, form)
        _check_sources(node, graph, makers, form)


def _check_values(kind: str, found: Mapping[str, TensorType], wanted: Mapping[str, TensorType]) -> None:
    for name in wanted.keys() | found.keys():
        if name not in wanted or name not in found:
            raise MalformedMessage(f"the graph has {'an' if name in found else 'no'} {kind} {name!r}")
        if name == graph_io.LOGITS:
            _check_logits(found[name], wanted[name])
        elif found[name] != wanted[name]:
            raise MalformedMessage(f"the {kind} {name!r} is {found[name]}, by the architecture {wanted[name]}")


def _check_logits(found: TensorType, wanted: TensorType) -> None:
    """Columns of padding may stand behind those of the vocabulary."""
    width, vocabulary_size = found.dims[-1] if len(found.dims) == 2 else None, wanted.dims[-1]
    assert vocabulary_size is not None, "the architecture has a vocabulary"
    if width is None or found != TensorType(FLOAT, (None, width)):
        raise MalformedMessage(f"the output {graph_io.LOGITS!r} is {found}")
    if not vocabulary_size <= width < vocabulary_size + MOST_PADDING:
        raise MalformedMessage(f"the logits have {width} columns, the vocabulary {vocabulary_size} tokens")


def _check_operator(node: Node, form: _Form) -> None:
    if node.operator not in form.operators:
        raise MalformedMessage(f"the operator {node.operator!r} is not one of those that Ferryman writes here")
    if unknown := node.attributes.keys() - _ATTRIBUTES[node.operator]:
        raise MalformedMessage(f"a node {node.operator} has the attribute {min(unknown)!r}")
    heads = form.architecture.heads
    for name in ("num_heads", "kv_num_heads"):
        if name in _ATTRIBUTES[node.operator] and node.attributes.get(name) != heads:
            text = f"{name} {node.attributes.get(name)}, the architecture has {heads} heads"
            raise MalformedMessage(f"a node {node.operator} has {text}")


def _check_sources(node: Node, graph: Graph, makers: Mapping[str, Node], form: _Form) -> None:
    """Check where lengths, positions, caches and counts come from: the inputs that serving fills, nothing else."""
    if len(node.inputs) != _INPUTS.get(node.operator, len(node.inputs)):
        raise MalformedMessage(f"a node {node.operator} has {len(node.inputs)} inputs")
    for place, name in _NAMED_INPUTS.get(node.operator, {}).items():
        if node.inputs[place] != name:
            raise MalformedMessage(f"input {place} of a node {node.operator} is not {name!r}")
    if node.operator == _GROUP_QUERY and not set(node.inputs[3:5]) <= form.inputs.keys():
        raise MalformedMessage("the cache of self-attention is not an input")
    if node.operator == _ROTARY:
        table = form.rotations, form.architecture.head_dim // 2
        for name in node.inputs[1:3]:
            if name not in graph.constants or graph.constants[name].dims != table:
                raise MalformedMessage(f"the table of rotations {name!r} is not a constant of {table}")
    if node.operator == _ATTENTION:
        lengths = makers.get(node.inputs[6])
        if lengths is None or lengths.operator != "Cast" or lengths.inputs != (graph_io.SOURCE_LENGTHS,):
            raise MalformedMessage("the lengths of attention are not those of the sources")


def _form_of(name: str, header: ManifestHeader) -> _Form:
    architecture, layers = header.architecture, header.architecture.decoder_layers
    is_fp16 = name in FP16_FILES
    element_type = FLOAT16 if is_fp16 else FLOAT
    if name == REORDER_FILE:
        data, index = TensorType(INT64, (None, None, None)), TensorType(INT64, (None,))
        inputs = {graph_io.DATA: data, graph_io.INDEX: index}
        return _Form(frozenset({"Gather"}), 4, inputs, {graph_io.MOVED: data}, architecture)
    if name in (graph_files(ComputeType.FP32).encoder, ENCODER_INT8_FILE, ENCODER_FP16_FILE):
        layers += header.lineage.recipe.model.encoder_layers
        return _Form(
            operators=_NETWORK | (frozenset({"Cast", _SKIP}) if is_fp16 else _CPU_PRODUCTS),
            most_nodes=_OTHER_NODES + _NODES_PER_LAYER * layers,
            inputs=_encoder_inputs(architecture, is_fp16=is_fp16),
            outputs=_keys_values("cross", architecture, element_type),
            architecture=architecture,
            rotations=header.max_sentence_tokens,
        )
    assert name in (graph_files(ComputeType.FP32).decoder, DECODER_INT8_FILE, DECODER_FP16_FILE), "there is no other"
    return _Form(
        operators=_STEP | (_GPU_HEAD | {_SKIP} if is_fp16 else _CPU_PRODUCTS | _CPU_HEAD),
        most_nodes=_OTHER_NODES + _NODES_PER_LAYER * layers,
        inputs=_decoder_inputs(architecture, element_type),
        outputs=_decoder_outputs(architecture, element_type),
        architecture=architecture,
        rotations=graph_io.MAX_TARGET_LENGTH,
    )


def _encoder_inputs(architecture: Architecture, *, is_fp16: bool) -> dict[str, TensorType]:
    return {
        graph_io.EMBEDDED: TensorType(FLOAT, (None, None, architecture.d_model)),
        graph_io.SOURCE_LENGTHS: TensorType(INT32, (None,)),
        **({graph_io.POSITIONS: TensorType(INT64, (None, None))} if architecture.rotates else {}),
        **({graph_io.SHAPE: _EXPECTED_SHAPE} if is_fp16 else {}),
    }


def _decoder_inputs(architecture: Architecture, element_type: int) -> dict[str, TensorType]:
    is_fp16 = element_type == FLOAT16
    return {
        graph_io.EMBEDDED: TensorType(FLOAT, (None, None, architecture.d_model)),
        graph_io.PAST_LENGTHS: TensorType(INT32, (None,)),
        graph_io.TOTAL_LENGTH: TensorType(INT32, ()),
        **({graph_io.POSITIONS: TensorType(INT64, (None, 1))} if architecture.rotates else {}),
        graph_io.SOURCE_LENGTHS: TensorType(INT32, (None,)),
        graph_io.K: TensorType(INT64, (1,)),
        **_keys_values("cross", architecture, element_type),
        **_keys_values("past", architecture, element_type),
        **({graph_io.SHAPE: _EXPECTED_SHAPE} if is_fp16 else {}),
        **({graph_io.SOURCE_POSITIONS: TensorType(INT32, (None,))} if is_fp16 else {}),
    }


def _decoder_outputs(architecture: Architecture, element_type: int) -> dict[str, TensorType]:
    return {
        graph_io.LOGITS: TensorType(FLOAT, (None, architecture.vocabulary_size)),
        graph_io.LOG_PROBS: TensorType(FLOAT, (None, None)),
        graph_io.TOKENS: TensorType(INT64, (None, None)),
        graph_io.ATTENTION: TensorType(element_type, (None, architecture.heads, None, None)),
        **_keys_values("present", architecture, element_type),
        **({graph_io.BEST: TensorType(FLOAT, (None, None))} if element_type == FLOAT16 else {}),
    }


def _keys_values(kind: str, architecture: Architecture, element_type: int) -> dict[str, TensorType]:
    """Return each layer's keys and values: self-attention's heads are as wide as its cache."""
    width = architecture.head_dim if kind == "cross" else graph_io.cache_width(architecture.head_dim)
    value = TensorType(element_type, (None, architecture.heads, None, width))
    return dict.fromkeys(graph_io.keys_values_names(kind, architecture.decoder_layers), value)
