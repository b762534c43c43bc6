"""Graphs of one decoder step with random weights, in several forms: which operators are fastest?

Shape suffixes: S sentences, W rows per sentence, R = S * W rows, L source positions, T positions that a cache has room
for, H heads, E head width, D model width, F feed-forward width, V vocabulary, K candidates per row.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray

from ferryman_service.training.graph_builder import CONTRIB, GraphBuilder

CANDIDATES: Final = 12
_MAX_POSITIONS: Final = 512

Array = NDArray[Any]


class SelfAttention(enum.StrEnum):
    """How rows attend to their own past.

    GQA: GroupQueryAttention, in place. CONCAT: gather the parents' caches, append, FusedMatMul and Softmax. TREE: one
    cache per sentence for all its rows, TensorScatter, a mask of ancestors. A24: TensorScatter-24 and Attention-24.
    """

    GQA = "gqa"
    CONCAT = "concat"
    TREE = "tree"
    A24 = "a24"


class CrossAttention(enum.StrEnum):
    """How a sentence's rows attend to its source: FusedMatMul and Softmax, MultiHeadAttention, or Attention-24."""

    PLAIN = "plain"
    MHA = "mha"
    A24 = "a24"


class Head(enum.StrEnum):
    """What is returned of the logits. LOGSOFTMAX: of all, then TopK. LSE: TopK, less log-sum-exp from simple operators.
    TOPK: the best logits. ARGMAX: the best one. ALL: every logit."""

    LOGSOFTMAX = "logsoftmax"
    LSE = "lse"
    TOPK = "topk"
    ARGMAX = "argmax"
    ALL = "all"


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The decoder's numbers."""

    d_model: int
    ffn_dim: int
    heads: int
    layers: int
    vocabulary: int

    @property
    def head_dim(self) -> int:
        """E."""
        return self.d_model // self.heads


SIZES: Final[Mapping[str, Sizes]] = {
    "tiny": Sizes(d_model=128, ffn_dim=256, heads=4, layers=4, vocabulary=10_001),
    "base": Sizes(d_model=512, ffn_dim=2048, heads=8, layers=6, vocabulary=32_001),
}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A form of the step."""

    self_attention: SelfAttention
    cross_attention: CrossAttention = CrossAttention.PLAIN
    head: Head = Head.LOGSOFTMAX

    def __str__(self) -> str:
        return f"{self.self_attention}/{self.cross_attention}/{self.head}"


def parse_variant(text: str) -> Variant:
    """Return the variant written as "gqa/plain/logsoftmax", the parts at the end being optional; raises ValueError."""
    first, *others = text.split("/")
    if len(others) > 2:
        raise ValueError(f"{text!r} has {len(others) + 1} parts, at most 3 are legal, such as gqa/plain/logsoftmax")
    defaults: list[str] = [CrossAttention.PLAIN, Head.LOGSOFTMAX]
    cross, head = others + defaults[len(others) :]
    return Variant(self_attention=SelfAttention(first), cross_attention=CrossAttention(cross), head=Head(head))


class StepBuilder(GraphBuilder):
    """A GraphBuilder that draws weights, and declares an input once however often it is asked for."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__("step")
        self._random = np.random.default_rng(seed)
        self._declared: set[str] = set()

    def input(self, name: str, element_type: str, shape: Sequence[str | int]) -> str:
        """Declare an input if it is not yet; return its name."""
        if name not in self._declared:
            self._declared.add(name)
            super().input(name, element_type, shape)
        return name

    def weight(self, *shape: int) -> str:
        """Add random weights whose columns have about the norm 1."""
        values = self._random.standard_normal(shape) * shape[0] ** -0.5
        return self.constant(values.astype(np.float32))

    def split(self, value: str, count: int) -> list[str]:
        """Cut the second dimension into equal parts."""
        return self.nodes("Split", [value], [""] * count, axis=1, num_outputs=count)


class StepGraph:
    """Builds one decoder step of post-norm layers."""

    def __init__(self, sizes: Sizes, variant: Variant) -> None:
        self._sizes = sizes
        self._variant = variant
        self._graph = StepBuilder()

    def build(self) -> onnx.ModelProto:
        """Return the graph: tokens and positions in, candidates out, caches in and out."""
        graph, sizes = self._graph, self._sizes
        token = graph.input("token", "int64", ["R"])
        position = graph.input("position", "int64", ["R"])
        embedded = graph.node("Gather", [graph.weight(sizes.vocabulary, sizes.d_model), token])
        x = graph.node("Add", [embedded, graph.node("Gather", [graph.weight(_MAX_POSITIONS, sizes.d_model), position])])
        for layer in range(sizes.layers):
            x = self._norm(x, self._linear(self._self_attention(x, layer), sizes.d_model, sizes.d_model))
            x = self._norm(x, self._linear(self._cross_attention(x, layer), sizes.d_model, sizes.d_model))
            inner = graph.node("Relu", [self._linear(x, sizes.d_model, sizes.ffn_dim)])
            x = self._norm(x, self._linear(inner, sizes.ffn_dim, sizes.d_model))
        self._head(graph.node("MatMul", [x, graph.weight(sizes.d_model, sizes.vocabulary)]))
        return graph.build()

    def _linear(self, x: str, width_in: int, width_out: int) -> str:
        bias = self._graph.constant(np.zeros(width_out, np.float32))
        return self._graph.node("Gemm", [x, self._graph.weight(width_in, width_out), bias])

    def _norm(self, x: str, sublayer: str) -> str:
        ones, zeros = (self._graph.constant(np.full(self._sizes.d_model, value, np.float32)) for value in (1, 0))
        added = self._graph.node("Add", [x, sublayer])
        return self._graph.node("LayerNormalization", [added, ones, zeros], epsilon=1e-5, axis=-1)

    def _self_attention(self, x: str, layer: int) -> str:
        """Return the rows' attention to their past, [R, D]."""
        joint = self._linear(x, self._sizes.d_model, 3 * self._sizes.d_model)
        forms = {
            SelfAttention.GQA: self._gqa,
            SelfAttention.CONCAT: self._concat,
            SelfAttention.TREE: self._tree,
            SelfAttention.A24: self._a24,
        }
        return self._flat(forms[self._variant.self_attention](joint, layer))

    def _gqa(self, joint: str, layer: int) -> str:
        graph, heads = self._graph, self._sizes.heads
        past = self._caches(layer, ["R", heads, "T", self._sizes.head_dim])
        lengths = graph.input("past_lengths", "int32", ["R"])
        total = graph.input("total_length", "int32", [])
        inputs = [graph.node("Unsqueeze", [joint, graph.constant([1])]), "", "", *past, lengths, total]
        outputs = [f"attended_{layer}", *self._present(layer, ["R", heads, "T", self._sizes.head_dim])]
        sizes = {"num_heads": heads, "kv_num_heads": heads}
        return graph.nodes("GroupQueryAttention", inputs, outputs, domain=CONTRIB, **sizes)[0]

    def _concat(self, joint: str, layer: int) -> str:
        graph, heads, head_dim = self._graph, self._sizes.heads, self._sizes.head_dim
        parent = graph.input("parent", "int64", ["R"])
        shape = graph.constant([-1, heads, 1, head_dim])
        query, *new = (graph.node("Reshape", [part, shape]) for part in graph.split(joint, 3))
        past = self._caches(layer, ["R", heads, "T", head_dim])
        present = self._present(layer, ["R", heads, "T + 1", head_dim])
        for before, added, after in zip(past, new, present, strict=True):
            graph.nodes("Concat", [graph.node("Gather", [before, parent]), added], [after], axis=2)
        return self._attend(query, present, None)

    def _tree(self, joint: str, layer: int) -> str:
        graph, heads, head_dim = self._graph, self._sizes.heads, self._sizes.head_dim
        mask = graph.input("ancestors", "float32", ["S", 1, "W", "T"])
        place = graph.input("place", "int64", ["S"])
        query, *new = (self._by_sentence(part) for part in graph.split(joint, 3))
        past = self._caches(layer, ["S", heads, "T", head_dim])
        present = self._present(layer, ["S", heads, "T", head_dim])
        for before, added, after in zip(past, new, present, strict=True):
            graph.nodes("TensorScatter", [before, added, place], [after])
        return graph.node("Transpose", [self._attend(query, present, mask)], perm=[0, 2, 1, 3])

    def _a24(self, joint: str, layer: int) -> str:
        graph, width, heads = self._graph, self._sizes.d_model, self._sizes.heads
        place = graph.input("place", "int64", ["R"])
        lengths = graph.input("lengths", "int64", ["R"])
        query, *new = (graph.node("Unsqueeze", [part, graph.constant([1])]) for part in graph.split(joint, 3))
        past, present = self._caches(layer, ["R", "T", width]), self._present(layer, ["R", "T", width])
        for before, added, after in zip(past, new, present, strict=True):
            graph.nodes("TensorScatter", [before, added, place], [after], axis=1)
        inputs = [query, *present, "", "", "", lengths]
        return graph.node("Attention", inputs, q_num_heads=heads, kv_num_heads=heads)

    def _cross_attention(self, x: str, layer: int) -> str:
        """Return the rows' attention to their sentence's source, [R, D]."""
        graph, sizes = self._graph, self._sizes
        query = self._linear(x, sizes.d_model, sizes.d_model)
        kind = self._variant.cross_attention
        dimensions: dict[str, tuple[int | str, int | str]] = {
            "keys": ("L", sizes.head_dim),
            "values": ("L", sizes.head_dim),
        }
        if kind is CrossAttention.PLAIN:
            dimensions["keys"] = (sizes.head_dim, "L")
        keys, values = (
            graph.input(f"cross_{part}_{layer}", "float32", ["S", sizes.heads, *dimensions[part]])
            for part in ("keys", "values")
        )
        if kind is CrossAttention.MHA:
            bias = graph.input("wide_bias", "float32", ["S", 1, "W", "L"])
            joined = graph.node("Reshape", [query, graph.input("shape_SWD", "int64", [3])])
            inputs = [joined, keys, values, "", "", bias]
            return self._flat(graph.node("MultiHeadAttention", inputs, domain=CONTRIB, num_heads=sizes.heads))
        by_sentence = self._by_sentence(query)
        if kind is CrossAttention.A24:
            lengths = graph.input("source_lengths", "int64", ["S"])
            attended = graph.node("Attention", [by_sentence, keys, values, "", "", "", lengths])
        else:
            bias = graph.input("bias", "float32", ["S", 1, 1, "L"])
            attended = self._attend(by_sentence, (keys, values), bias, keys_by_width=True)
        return self._flat(graph.node("Transpose", [attended], perm=[0, 2, 1, 3]))

    def _attend(self, query: str, keys_values: Sequence[str], bias: str | None, *, keys_by_width: bool = False) -> str:
        """Attend with simple operators; keys are [..., T, E], or by width [..., E, T]."""
        graph, (keys, values) = self._graph, keys_values
        sizes = {"transB": int(not keys_by_width), "alpha": self._sizes.head_dim**-0.5}
        scores = graph.node("FusedMatMul", [query, keys], domain=CONTRIB, **sizes)
        if bias is not None:
            scores = graph.node("Add", [scores, bias])
        return graph.node("MatMul", [graph.node("Softmax", [scores], axis=-1), values])

    def _by_sentence(self, x_RD: str) -> str:
        """Return [S, H, W, E]."""
        shape = self._graph.input("shape_SWHE", "int64", [4])
        return self._graph.node("Transpose", [self._graph.node("Reshape", [x_RD, shape])], perm=[0, 2, 1, 3])

    def _flat(self, x: str) -> str:
        return self._graph.node("Reshape", [x, self._graph.constant([-1, self._sizes.d_model])])

    def _caches(self, layer: int, shape: Sequence[int | str]) -> list[str]:
        return [self._graph.input(f"past_{part}_{layer}", "float32", shape) for part in ("keys", "values")]

    def _present(self, layer: int, shape: Sequence[int | str]) -> list[str]:
        names = [f"present_{part}_{layer}" for part in ("keys", "values")]
        for name in names:
            self._graph.output(name, "float32", shape)
        return names

    def _head(self, logits: str) -> None:
        graph, best = self._graph, ["best", "tokens"]
        match self._variant.head:
            case Head.LOGSOFTMAX:
                everything = graph.node("LogSoftmax", [logits], axis=-1)
                graph.nodes("TopK", [everything, graph.constant([CANDIDATES])], best, axis=-1)
            case Head.TOPK:
                graph.nodes("TopK", [logits, graph.constant([CANDIDATES])], best, axis=-1)
            case Head.LSE:
                self._less_log_sum_exp(logits)
            case Head.ARGMAX:
                graph.nodes("ArgMax", [logits], ["tokens"], axis=-1, keepdims=1)
                graph.nodes("ReduceMax", [logits, graph.constant([-1])], ["best"], keepdims=1)
            case Head.ALL:
                graph.nodes("Identity", [logits], ["best"])
        graph.output("best", "float32", ["R", "K"])
        if self._variant.head is not Head.ALL:
            graph.output("tokens", "int64", ["R", "K"])

    def _less_log_sum_exp(self, logits: str) -> None:
        graph = self._graph
        highest, _ = graph.nodes("TopK", [logits, graph.constant([CANDIDATES])], ["highest", "tokens"], axis=-1)
        maximum = graph.node("Slice", [highest, graph.constant([0]), graph.constant([1]), graph.constant([1])])
        powers = graph.node("Exp", [graph.node("Sub", [logits, maximum])])
        log_sum = graph.node("Log", [graph.node("ReduceSum", [powers, graph.constant([-1])], keepdims=1)])
        graph.nodes("Sub", [highest, graph.node("Add", [maximum, log_sum])], ["best"])


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """What a step is measured with: sentences, rows of each, source positions, positions that the caches hold and have
    room for."""

    sentences: int
    width: int
    source_length: int = 15
    past_length: int = 10
    room: int = 16

    @property
    def rows(self) -> int:
        """R."""
        return self.sentences * self.width


def step_inputs(sizes: Sizes, variant: Variant, batch: StepBatch) -> dict[str, Array]:
    """Return arrays for every input that the variant may have, and some others."""
    random, past, rows = np.random.default_rng(1), batch.past_length, batch.rows
    per_sentence = variant.self_attention is SelfAttention.TREE

    def floats(*shape: int) -> Array:
        return (0.3 * random.standard_normal(shape)).astype(np.float32)

    cache = {
        SelfAttention.GQA: (rows, sizes.heads, batch.room, sizes.head_dim),
        SelfAttention.CONCAT: (rows, sizes.heads, past, sizes.head_dim),
        SelfAttention.TREE: (batch.sentences, sizes.heads, batch.room * batch.width, sizes.head_dim),
        SelfAttention.A24: (rows, batch.room, sizes.d_model),
    }[variant.self_attention]
    seen = np.arange(batch.room * batch.width) < (past + 1) * batch.width
    inputs: dict[str, Array] = {
        "token": random.integers(4, sizes.vocabulary, rows),
        "position": np.full(rows, past),
        "parent": np.arange(rows),
        "past_lengths": np.full(rows, past, np.int32),
        "total_length": np.array(past + 1, np.int32),
        "place": np.full(batch.sentences if per_sentence else rows, past * batch.width if per_sentence else past),
        "lengths": np.full(rows, past + 1),
        "ancestors": np.broadcast_to(np.where(seen, 0, -1e9), (batch.sentences, 1, batch.width, len(seen))).astype(
            np.float32
        ),
        "bias": np.zeros((batch.sentences, 1, 1, batch.source_length), np.float32),
        "wide_bias": np.zeros((batch.sentences, 1, batch.width, batch.source_length), np.float32),
        "source_lengths": np.full(batch.sentences, batch.source_length),
        "shape_SWD": np.array([batch.sentences, batch.width, sizes.d_model]),
        "shape_SWHE": np.array([batch.sentences, batch.width, sizes.heads, sizes.head_dim]),
    }
    source = {"keys": (batch.source_length, sizes.head_dim), "values": (batch.source_length, sizes.head_dim)}
    if variant.cross_attention is CrossAttention.PLAIN:
        source["keys"] = (sizes.head_dim, batch.source_length)
    for layer in range(sizes.layers):
        for part in ("keys", "values"):
            inputs[f"past_{part}_{layer}"] = floats(*cache)
            inputs[f"cross_{part}_{layer}"] = floats(batch.sentences, sizes.heads, *source[part])
    return inputs
