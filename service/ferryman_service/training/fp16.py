"""The graphs in 16 bits, in the form for a GPU; bundle/graph_io.py says what they take and give.

Weights, what lies between the products, keys and values are float16; layer norms take mean and variance in float32, and
log-probabilities are float32. No node asks for a shape, or is one that only a CPU has: so a step can be captured and
replayed as a whole.

Shape suffixes: S sentences, L source positions, W rows per sentence, R = S * W rows, N any rows, D model width, H
heads, E head width, V vocabulary and padding, K candidates per row, G groups, M and N items, X numbers of an item.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import onnx

from ferryman_service.bundle import graph_io
from ferryman_service.model.config import TransformerConfig
from ferryman_service.training.graph_builder import GraphBuilder
from ferryman_service.training.graphs import DecoderGraph, EncoderGraph, Products, Weights, padded_projection

_LEAST: Final = float(np.finfo(np.float16).min)
_COLUMN_MULTIPLE: Final = 8
"""The vocabulary is padded to it: products of 16 bits are fastest in such shapes."""


class Float16Products:
    """Products of the graphs in 16 bits. The bias is added apart: so it can be fused with what follows."""

    element_type: Final = "float16"

    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    def linear(self, builder: GraphBuilder, x_ND: str, module: str) -> str:
        """Return x_ND times the module's matrix plus its bias."""
        weight_DO = np.ascontiguousarray(self._weights[f"{module}.weight"].T).astype(np.float16)
        bias_O = self._weights[f"{module}.bias"].astype(np.float16)
        return builder.node(
            "Add", [builder.node("MatMul", [x_ND, builder.constant(weight_DO)]), builder.constant(bias_O)]
        )

    def project(self, builder: GraphBuilder, x_ND: str, padding: int, name: str) -> str:
        """Return x_ND times the embedding matrix as float32, with so many more columns that are the least there is."""
        matrix_DV = padded_projection(self._weights, padding).astype(np.float16)
        logits_NV = builder.node("MatMul", [x_ND, builder.constant(matrix_DV)])
        if padding:
            bias_V = np.zeros(matrix_DV.shape[1], np.float16)
            bias_V[-padding:] = _LEAST
            logits_NV = builder.node("Add", [logits_NV, builder.constant(bias_V)])
        return builder.cast(logits_NV, "float32", name=name)

    def feed_forward_relu(self, builder: GraphBuilder, x_ND: str, inner: str, outer: str) -> str:
        """Return outer(ReLU(inner(x_ND)))."""
        return self.linear(builder, builder.node("Relu", [self.linear(builder, x_ND, inner)]), outer)


def device_encoder_graph(
    config: TransformerConfig, weights: Weights, products: Products, max_length: int
) -> onnx.ModelProto:
    """Return the encoder for sources of at most `max_length` tokens, with the decoder's cross-attention projections."""
    return _DeviceEncoder(config, weights, products, max_length).build()


def device_decoder_graph(config: TransformerConfig, weights: Weights, products: Products) -> onnx.ModelProto:
    """Return one step of the decoder."""
    return _DeviceDecoder(config, weights, products).build()


def reorder_graph() -> onnx.ModelProto:
    """Return the graph that moves what a running batch holds."""
    builder = GraphBuilder("reorder")
    data_GNX = builder.input(graph_io.DATA, "int64", ["groups", "items", "numbers"])
    index_M = builder.input(graph_io.INDEX, "int64", ["moved_items"])
    builder.node("Gather", [data_GNX, index_M], name=graph_io.MOVED, axis=1)
    builder.output(graph_io.MOVED, "int64", ["groups", "moved_items", "numbers"])
    return builder.build()


class _DeviceEncoder(EncoderGraph):
    def shape_of(self, x_ABD: str) -> str:
        """Return the input that holds the shape."""
        return self.builder.input(graph_io.SHAPE, "int64", [3])


class _DeviceDecoder(DecoderGraph):
    def shape_of(self, x_ABD: str) -> str:
        """Return the input that holds the shape."""
        return self.builder.input(graph_io.SHAPE, "int64", [3])

    def declare_inputs(self) -> None:
        """Declare all inputs but x and its shape."""
        super().declare_inputs()
        self.builder.input(graph_io.SOURCE_POSITIONS, "int32", ["source_positions"])

    def attend_and_tell(self, query_SWD: str, cross: list[str]) -> str:
        """Attend in single steps: CUDA has no operator that also returns the weights."""
        builder, config = self.builder, self.config
        keys_SHLE, values_SHLE = cross
        scale = self.constant(np.array([config.head_dim**-0.5], np.float32))
        scaled_SWD = builder.node("Mul", [query_SWD, scale])
        by_heads = builder.node("Reshape", [scaled_SWD, builder.constant([0, 0, config.heads, config.head_dim])])
        query_SHWE = builder.node("Transpose", [by_heads], perm=[0, 2, 1, 3])
        keys_SHEL = builder.node("Transpose", [keys_SHLE], perm=[0, 1, 3, 2])
        scores_SHWL = builder.node("MatMul", [query_SHWE, keys_SHEL])
        lengths_S111 = builder.node("Unsqueeze", [graph_io.SOURCE_LENGTHS, builder.constant([1, 2, 3])])
        source_S11L = builder.node("Less", [graph_io.SOURCE_POSITIONS, lengths_S111])
        least = self.constant(np.array(_LEAST, np.float32))
        masked_SHWL = builder.node("Where", [source_S11L, scores_SHWL, least])
        weight_SHWL = builder.node("Softmax", [masked_SHWL], name=graph_io.ATTENTION, axis=-1)
        builder.output(graph_io.ATTENTION, self.element_type, ["sentences", config.heads, "width", "source_positions"])
        attended_SHWE = builder.node("MatMul", [weight_SHWL, values_SHLE])
        return builder.node("Transpose", [attended_SHWE], perm=[0, 2, 1, 3])

    def head(self, hidden_RD: str) -> None:
        """Find the best continuations of each row, with one node: on a GPU nodes cost more than what they do."""
        builder, vocabulary_size = self.builder, self.config.vocabulary_size
        padding = -vocabulary_size % _COLUMN_MULTIPLE
        logits_RV = self.products.project(builder, hidden_RD, padding, graph_io.LOGITS)
        log_probs_RV = builder.node("LogSoftmax", [logits_RV], axis=-1)
        best = [graph_io.LOG_PROBS, graph_io.TOKENS]
        log_probs_RK, tokens_RK = builder.nodes("TopK", [log_probs_RV, graph_io.K], best, axis=-1, largest=1, sorted=1)
        # Tokens are whole numbers below 2**24: float32 holds them.
        builder.node("Concat", [log_probs_RK, builder.cast(tokens_RK, "float32")], name=graph_io.BEST, axis=-1)
        builder.output(graph_io.LOGITS, "float32", ["rows", vocabulary_size + padding])
        builder.output(graph_io.LOG_PROBS, "float32", ["rows", "candidates"])
        builder.output(graph_io.TOKENS, "int64", ["rows", "candidates"])
        builder.output(graph_io.BEST, "float32", ["rows", "both"])
