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
from ferryman_service.domain.recipe import NormPlacement
from ferryman_service.model.config import TransformerConfig
from ferryman_service.training.graph_builder import CONTRIB, GraphBuilder
from ferryman_service.training.graphs import (
    LAYER_NORM_EPSILON,
    DecoderGraph,
    EncoderGraph,
    NetworkGraph,
    Weights,
    padded_projection,
)

_LEAST: Final = float(np.finfo(np.float16).min)
_COLUMN_MULTIPLE: Final = 8
"""The vocabulary is padded to it: products of 16 bits are fastest in such shapes."""


class Float16Products:
    """Products of the graphs in 16 bits."""

    element_type: str = "float16"

    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    def linear(self, builder: GraphBuilder, x_ND: str, module: str) -> str:
        """Return x_ND times the module's matrix plus its bias."""
        return builder.node("Add", [self.product(builder, x_ND, module), self.bias(builder, module)])

    def product(self, builder: GraphBuilder, x_ND: str, module: str) -> str:
        """Return x_ND times the module's matrix."""
        weight_DO = np.ascontiguousarray(self._weights[f"{module}.weight"].T).astype(self.element_type)
        return builder.node("MatMul", [x_ND, builder.constant(weight_DO)])

    def bias(self, builder: GraphBuilder, module: str) -> str:
        """Return the module's bias."""
        return builder.constant(self._weights[f"{module}.bias"].astype(self.element_type))

    def project(self, builder: GraphBuilder, x_ND: str, padding: int, name: str) -> str:
        """Return x_ND times the embedding matrix as float32, with so many more columns that are the least there is."""
        matrix_DV = padded_projection(self._weights, padding).astype(self.element_type)
        logits_NV = builder.node("MatMul", [x_ND, builder.constant(matrix_DV)])
        if padding:
            bias_V = np.zeros(matrix_DV.shape[1], self.element_type)
            bias_V[-padding:] = _LEAST
            logits_NV = builder.node("Add", [logits_NV, builder.constant(bias_V)])
        return builder.cast(logits_NV, "float32", name=name)

    def feed_forward_relu(self, builder: GraphBuilder, x_ND: str, inner: str, outer: str) -> str:
        """Return outer(ReLU(inner(x_ND)))."""
        return self.linear(builder, builder.node("Relu", [self.linear(builder, x_ND, inner)]), outer)


def device_encoder_graph(
    config: TransformerConfig, weights: Weights, products: Float16Products, max_length: int
) -> onnx.ModelProto:
    """Return the encoder for sources of at most `max_length` tokens, with the decoder's cross-attention projections."""
    return _DeviceEncoder(config, weights, products, max_length).build()


def device_decoder_graph(config: TransformerConfig, weights: Weights, products: Float16Products) -> onnx.ModelProto:
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


class _DeviceForm(NetworkGraph):
    """What both graphs have in common. With post-norm a sublayer's last bias, its residual connection and its norm are
    one node; on a GPU nodes cost more than what they do."""

    products: Float16Products

    def shape_of(self, x_ABD: str) -> str:
        """Return the input that holds the shape."""
        return self.builder.input(graph_io.SHAPE, "int64", [3])

    def answer(self, x_ND: str, module: str) -> str:
        """Return x_ND times the matrix of a sublayer's last module, for `leave`, which adds the bias."""
        if self.config.norm is NormPlacement.PRE:
            return self.linear(x_ND, module)
        self._bias = self.products.bias(self.builder, module)
        return self.products.product(self.builder, x_ND, module)

    def feed_forward_answer(self, x_ND: str, inner: str, outer: str) -> str:
        """Return what the sublayer of these modules answers, for `leave`."""
        return self.answer(self.activate(self.linear(x_ND, inner)), outer)

    def leave(self, x_ND: str, answer_ND: str, residual: str, alpha: float) -> str:
        """Return x_ND joined with what `answer` has returned."""
        if self.config.norm is NormPlacement.PRE:
            return super().leave(x_ND, answer_ND, residual, alpha)
        if alpha != 1.0:
            x_ND = self.builder.node("Mul", [x_ND, self.constant(np.array([alpha], np.float32))])
        norm = (self.constant(self.weights[f"{residual}.norm.{part}"]) for part in ("weight", "bias"))
        inputs = [x_ND, answer_ND, *norm, self._bias]
        return self.builder.node("SkipLayerNormalization", inputs, domain=CONTRIB, epsilon=LAYER_NORM_EPSILON)


class _DeviceEncoder(_DeviceForm, EncoderGraph):
    pass


class _DeviceDecoder(_DeviceForm, DecoderGraph):
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
        """Find the best continuations of each row."""
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
