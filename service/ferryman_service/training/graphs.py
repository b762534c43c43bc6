"""The two halves of translating as ONNX graphs, built for ONNX Runtime; bundle/graph_io.py says what they take and
give.

Shape suffixes: S sentences, L source positions, W rows per sentence, R = S * W rows, N any rows, D model width, H
heads, E head width, C head width in the decoder's self-attention, F feed-forward width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Protocol

import numpy as np
import onnx
from numpy.typing import NDArray

from ferryman_service.bundle import graph_io
from ferryman_service.domain.recipe import Activation, NormPlacement, Positions
from ferryman_service.model.config import TransformerConfig
from ferryman_service.model.layers import deep_norm
from ferryman_service.model.positions import sinusoids
from ferryman_service.model.transformer import Transformer
from ferryman_service.training.graph_builder import CONTRIB, OMITTED, GraphBuilder

Weights = Mapping[str, NDArray[np.float32]]
"""The Transformer's state dict as `graph_weights` gives it."""

PROJECTION: Final = "projection"
"""What the input of the product with the embedding matrix is called, where inputs are named by their module."""
_FEWEST_BLOCKS: Final = 72
"""More than the candidates of a beam of 32."""
LAYER_NORM_EPSILON: Final = 1e-5
_LEAST: Final = float(np.finfo(np.float32).min)
"""Is added to the scores of padding; the operator's own -10,000 would not cover what a cache may hold."""


class Products(Protocol):
    """Matrix products in the arithmetic of a compute type. `module` is the path of the weights in the Transformer."""

    @property
    def element_type(self) -> str:
        """What products take and give: float32, or float16."""
        ...

    def linear(self, builder: GraphBuilder, x_ND: str, module: str) -> str:
        """Return x_ND times the module's matrix plus its bias."""
        ...

    def project(self, builder: GraphBuilder, x_ND: str, padding: int, name: str) -> str:
        """Return x_ND times the embedding matrix as float32, with so many more columns that are the least there is."""
        ...

    def feed_forward_relu(self, builder: GraphBuilder, x_ND: str, inner: str, outer: str) -> str:
        """Return outer(ReLU(inner(x_ND)))."""
        ...


class Float32Products:
    """Plain float32."""

    element_type: Final = "float32"

    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    def linear(self, builder: GraphBuilder, x_ND: str, module: str) -> str:
        """Return x_ND times the module's matrix plus its bias."""
        matrix = builder.constant(np.ascontiguousarray(self._weights[f"{module}.weight"].T))
        return builder.node("Gemm", [x_ND, matrix, builder.constant(self._weights[f"{module}.bias"])])

    def project(self, builder: GraphBuilder, x_ND: str, padding: int, name: str) -> str:
        """Return x_ND times the embedding matrix, with so many more columns that are the least there is."""
        matrix = builder.constant(padded_projection(self._weights, padding))
        if not padding:
            return builder.node("MatMul", [x_ND, matrix], name=name)
        bias = builder.constant(padding_bias(self._weights, padding))
        return builder.node("Gemm", [x_ND, matrix, bias], name=name)

    def feed_forward_relu(self, builder: GraphBuilder, x_ND: str, inner: str, outer: str) -> str:
        """Return outer(ReLU(inner(x_ND)))."""
        return self.linear(builder, builder.node("Relu", [self.linear(builder, x_ND, inner)]), outer)


def graph_weights(transformer: Transformer) -> Weights:
    """Return the state dict as arrays, the heads of the decoder's self-attention as wide as its cache: what is added
    is zeros."""
    config = transformer.config
    weights = {name: tensor.detach().cpu().numpy() for name, tensor in transformer.state_dict().items()}
    added = graph_io.cache_width(config.head_dim) - config.head_dim
    for layer in range(config.decoder_layers if added else 0):
        packed, output = (f"decoder_layers.{layer}.self_attention.{part}" for part in ("query_key_value", "output"))
        by_heads = 3, config.heads, config.head_dim, -1
        for name, columns in ((f"{packed}.weight", config.d_model), (f"{packed}.bias", 1)):
            padded = np.pad(weights[name].reshape(by_heads), ((0, 0), (0, 0), (0, added), (0, 0)))
            weights[name] = padded.reshape((-1, columns) if columns > 1 else -1)
        output_DHE = weights[f"{output}.weight"].reshape(config.d_model, config.heads, config.head_dim)
        padded_DHC = np.pad(output_DHE, ((0, 0), (0, 0), (0, added)))
        weights[f"{output}.weight"] = padded_DHC.reshape(config.d_model, -1)
    return weights


def padded_projection(weights: Weights, padding: int) -> NDArray[np.float32]:
    """Return the embedding matrix as it is multiplied by, with columns of zeros at its end."""
    return np.ascontiguousarray(np.pad(weights["embedding.weight"], ((0, padding), (0, 0))).T)


def padding_bias(weights: Weights, padding: int) -> NDArray[np.float32]:
    """Return 0 for every token and the least number there is for each column that is none."""
    bias = np.zeros(len(weights["embedding.weight"]) + padding, np.float32)
    bias[len(bias) - padding :] = np.finfo(np.float32).min
    return bias


def encoder_graph(config: TransformerConfig, weights: Weights, products: Products, max_length: int) -> onnx.ModelProto:
    """Return the encoder for sources of at most `max_length` tokens, with the decoder's cross-attention projections."""
    return EncoderGraph(config, weights, products, max_length).build()


def decoder_graph(config: TransformerConfig, weights: Weights, products: Products) -> onnx.ModelProto:
    """Return one step of the decoder."""
    return DecoderGraph(config, weights, products).build()


class NetworkGraph:
    """What both graphs are made of."""

    def __init__(self, name: str, config: TransformerConfig, weights: Weights, products: Products, length: int) -> None:
        self.builder = GraphBuilder(name)
        self.config = config
        self.rotates = config.positions is Positions.ROPE
        self.products = products
        self.element_type = products.element_type
        self.weights = weights
        self._rotation_length = length
        self._sine_and_cosine: list[str] = []

    def linear(self, x_ND: str, module: str) -> str:
        """Return x_ND times the module's matrix plus its bias."""
        return self.products.linear(self.builder, x_ND, module)

    def constant(self, value: NDArray[np.float32]) -> str:
        """Return the name of a constant in the products' element type."""
        return self.builder.constant(value.astype(self.element_type))

    def embedded(self, x_ABD: str) -> str:
        """Return the input x_ABD as x_ND, in the products' element type."""
        x_ND = self.builder.node("Reshape", [x_ABD, self.builder.constant([-1, self.config.d_model])])
        return x_ND if self.element_type == "float32" else self.builder.cast(x_ND, self.element_type)

    def shape_of(self, x_ABD: str) -> str:
        """Return the shape of the input x_ABD."""
        return self.builder.node("Shape", [x_ABD])

    def norm(self, x_ND: str, module: str) -> str:
        """Return the module's layer norm of x_ND; mean and variance are float32 whatever x_ND is."""
        scale, bias = (self.constant(self.weights[f"{module}.{part}"]) for part in ("weight", "bias"))
        return self.builder.node("LayerNormalization", [x_ND, scale, bias], axis=-1, epsilon=LAYER_NORM_EPSILON)

    def enter(self, x_ND: str, residual: str) -> str:
        """Return what a sublayer is given; see model/layers.py."""
        return self.norm(x_ND, f"{residual}.norm") if self.config.norm is NormPlacement.PRE else x_ND

    def leave(self, x_ND: str, answer_ND: str, residual: str, alpha: float) -> str:
        """Return x_ND joined with the sublayer's answer."""
        if alpha != 1.0:
            x_ND = self.builder.node("Mul", [x_ND, self.constant(np.array([alpha], np.float32))])
        sum_ND = self.builder.node("Add", [x_ND, answer_ND])
        return sum_ND if self.config.norm is NormPlacement.PRE else self.norm(sum_ND, f"{residual}.norm")

    def answer(self, x_ND: str, module: str) -> str:
        """Return x_ND times the matrix of a sublayer's last module plus its bias, for `leave` alone."""
        return self.linear(x_ND, module)

    def feed_forward(self, x_ND: str, layer: str, alpha: float) -> str:
        """Return the layer's output after its feed-forward sublayer."""
        residual = f"{layer}.feed_forward_residual"
        entered = self.enter(x_ND, residual)
        answer = self.feed_forward_answer(entered, f"{layer}.feed_forward.inner", f"{layer}.feed_forward.outer")
        return self.leave(x_ND, answer, residual, alpha)

    def feed_forward_answer(self, x_ND: str, inner: str, outer: str) -> str:
        """Return what the sublayer of these modules answers, for `leave` alone."""
        if self.config.activation is Activation.RELU:
            return self.products.feed_forward_relu(self.builder, x_ND, inner, outer)
        return self.answer(self.activate(self.linear(x_ND, inner)), outer)

    def rotate(self, x_BTD: str, positions_BT: str) -> str:
        """Return x_BTD with each head's pairs of columns turned by their positions; see model/positions.py."""
        if not self._sine_and_cosine:
            pairs = sinusoids(self._rotation_length, self.config.head_dim).numpy()
            self._sine_and_cosine = [self.constant(np.ascontiguousarray(pairs[:, part::2])) for part in (0, 1)]
        sine, cosine = self._sine_and_cosine
        return self.builder.node(
            "RotaryEmbedding",
            [x_BTD, cosine, sine, positions_BT],
            interleaved=1,
            num_heads=self.config.heads,
            rotary_embedding_dim=self.config.head_dim,
        )

    def activate(self, inner: str) -> str:
        """Return the activation of what the feed-forward sublayer's first module gives."""
        builder = self.builder
        if self.config.activation is Activation.RELU:
            return builder.node("Relu", [inner])
        if self.config.activation is Activation.GELU:
            return builder.node("Gelu", [inner])
        gate, gated = builder.nodes("Split", [inner], ["", ""], axis=-1, num_outputs=2)
        return builder.node("Mul", [builder.node("Mul", [gate, builder.node("Sigmoid", [gate])]), gated])


class EncoderGraph(NetworkGraph):
    """The encoder in the form for a CPU."""

    def __init__(self, config: TransformerConfig, weights: Weights, products: Products, max_length: int) -> None:
        super().__init__("encoder", config, weights, products, max_length)
        self._alpha = deep_norm(config).encoder_alpha

    def build(self) -> onnx.ModelProto:
        """Return the model."""
        builder, config = self.builder, self.config
        x_SLD = builder.input(graph_io.EMBEDDED, "float32", ["sentences", "positions", config.d_model])
        lengths_S = builder.input(graph_io.SOURCE_LENGTHS, "int32", ["sentences"])
        positions_SL = builder.input(graph_io.POSITIONS, "int64", ["sentences", "positions"]) if self.rotates else ""
        shape_SLD = self.shape_of(x_SLD)
        x_ND = self.embedded(x_SLD)
        for index in range(config.encoder_layers):
            layer = f"encoder_layers.{index}"
            x_ND = self._self_attention(x_ND, layer, shape_SLD, lengths_S, positions_SL)
            x_ND = self.feed_forward(x_ND, layer, self._alpha)
        memory_ND = self.norm(x_ND, "encoder_norm") if config.norm is NormPlacement.PRE else x_ND
        names = graph_io.keys_values_names("cross", config.decoder_layers)
        for index in range(config.decoder_layers):
            packed = self.linear(memory_ND, f"decoder_layers.{index}.cross_attention.key_value")
            parts = builder.nodes("Split", [packed], ["", ""], axis=-1, num_outputs=2)
            for part, name in zip(parts, names[2 * index : 2 * index + 2], strict=True):
                part_SLD = builder.node("Reshape", [part, shape_SLD])
                heads = builder.node("Reshape", [part_SLD, builder.constant([0, 0, config.heads, config.head_dim])])
                builder.node("Transpose", [heads], name=name, perm=[0, 2, 1, 3])
                builder.output(name, self.element_type, ["sentences", config.heads, "positions", config.head_dim])
        return builder.build()

    def _self_attention(self, x_ND: str, layer: str, shape_SLD: str, lengths_S: str, positions_SL: str) -> str:
        builder, residual = self.builder, f"{layer}.self_attention_residual"
        packed = self.linear(self.enter(x_ND, residual), f"{layer}.self_attention.query_key_value")
        parts = builder.nodes("Split", [packed], ["", "", ""], axis=-1, num_outputs=3)
        query, key, value = (builder.node("Reshape", [part, shape_SLD]) for part in parts)
        if self.rotates:
            query, key = self.rotate(query, positions_SL), self.rotate(key, positions_SL)
        attended = builder.node(
            "MultiHeadAttention",
            [query, key, value, "", lengths_S],
            domain=CONTRIB,
            num_heads=self.config.heads,
            mask_filter_value=_LEAST,
        )
        flat = builder.node("Reshape", [attended, builder.constant([-1, self.config.d_model])])
        return self.leave(x_ND, self.answer(flat, f"{layer}.self_attention.output"), residual, self._alpha)


class DecoderGraph(NetworkGraph):
    """A step of the decoder in the form for a CPU."""

    def __init__(self, config: TransformerConfig, weights: Weights, products: Products) -> None:
        super().__init__("decoder", config, weights, products, graph_io.MAX_TARGET_LENGTH)
        self._alpha = deep_norm(config).decoder_alpha
        self._cache_width = graph_io.cache_width(config.head_dim)

    def build(self) -> onnx.ModelProto:
        """Return the model."""
        builder, config = self.builder, self.config
        layers = config.decoder_layers
        x_SWD = builder.input(graph_io.EMBEDDED, "float32", ["sentences", "width", config.d_model])
        self.declare_inputs()
        self._shape_SWD = self.shape_of(x_SWD)
        x_RD = self.embedded(x_SWD)
        past, present, cross = (graph_io.keys_values_names(kind, layers) for kind in ("past", "present", "cross"))
        for index in range(layers):
            layer, pair = f"decoder_layers.{index}", slice(2 * index, 2 * index + 2)
            x_RD = self._self_attention(x_RD, layer, past[pair], present[pair])
            x_RD = self._cross_attention(x_RD, layer, cross[pair], last=index == layers - 1)
            x_RD = self.feed_forward(x_RD, layer, self._alpha)
        hidden_RD = self.norm(x_RD, "decoder_norm") if config.norm is NormPlacement.PRE else x_RD
        self.head(hidden_RD)
        return builder.build()

    def declare_inputs(self) -> None:
        """Declare all inputs but x."""
        builder, config = self.builder, self.config
        builder.input(graph_io.PAST_LENGTHS, "int32", ["rows"])
        builder.input(graph_io.TOTAL_LENGTH, "int32", [])
        if self.rotates:
            builder.input(graph_io.POSITIONS, "int64", ["rows", 1])
        builder.input(graph_io.SOURCE_LENGTHS, "int32", ["sentences"])
        builder.input(graph_io.K, "int64", [1])
        heads, head_dim = config.heads, config.head_dim
        for name in graph_io.keys_values_names("cross", config.decoder_layers):
            builder.input(name, self.element_type, ["sentences", heads, "source_positions", head_dim])
        for name in graph_io.keys_values_names("past", config.decoder_layers):
            builder.input(name, self.element_type, ["rows", heads, "room", self._cache_width])

    def _self_attention(self, x_RD: str, layer: str, past: list[str], present: list[str]) -> str:
        builder, config, residual = self.builder, self.config, f"{layer}.self_attention_residual"
        packed = self.linear(self.enter(x_RD, residual), f"{layer}.self_attention.query_key_value")
        packed = builder.node("Unsqueeze", [packed, builder.constant([1])])
        query, key, value = packed, "", ""
        if self.rotates:
            query, key, value = builder.nodes("Split", [packed], ["", "", ""], axis=-1, num_outputs=3)
            query, key = self.rotate(query, graph_io.POSITIONS), self.rotate(key, graph_io.POSITIONS)
        attended, *_ = builder.nodes(
            "GroupQueryAttention",
            [query, key, value, *past, graph_io.PAST_LENGTHS, graph_io.TOTAL_LENGTH],
            ["", *present],
            domain=CONTRIB,
            num_heads=config.heads,
            kv_num_heads=config.heads,
            scale=config.head_dim**-0.5,
        )
        for name in present:
            builder.output(name, self.element_type, ["rows", config.heads, "room", self._cache_width])
        flat = builder.node("Reshape", [attended, builder.constant([-1, config.heads * self._cache_width])])
        return self.leave(x_RD, self.answer(flat, f"{layer}.self_attention.output"), residual, self._alpha)

    def _cross_attention(self, x_RD: str, layer: str, cross: list[str], *, last: bool) -> str:
        builder, residual = self.builder, f"{layer}.cross_attention_residual"
        query_RD = self.linear(self.enter(x_RD, residual), f"{layer}.cross_attention.query")
        query_SWD = builder.node("Reshape", [query_RD, self._shape_SWD])
        attend = self.attend_and_tell if last else self._attend
        flat = builder.node("Reshape", [attend(query_SWD, cross), builder.constant([-1, self.config.d_model])])
        return self.leave(x_RD, self.answer(flat, f"{layer}.cross_attention.output"), residual, self._alpha)

    def _attend(self, query_SWD: str, cross: list[str]) -> str:
        return self.builder.node(
            "MultiHeadAttention",
            [query_SWD, *cross, "", graph_io.SOURCE_LENGTHS],
            domain=CONTRIB,
            num_heads=self.config.heads,
            mask_filter_value=_LEAST,
        )

    def attend_and_tell(self, query_SWD: str, cross: list[str]) -> str:
        """Attend with the operator that also returns the weights."""
        builder, config = self.builder, self.config
        by_heads = builder.node("Reshape", [query_SWD, builder.constant([0, 0, config.heads, config.head_dim])])
        query_SHWE = builder.node("Transpose", [by_heads], perm=[0, 2, 1, 3])
        lengths_S = builder.node("Cast", [graph_io.SOURCE_LENGTHS], to=onnx.TensorProto.INT64)
        attended_SHWE, *_ = builder.nodes(
            "Attention",
            [query_SHWE, *cross, "", "", "", lengths_S],
            ["", OMITTED, OMITTED, graph_io.ATTENTION],
            qk_matmul_output_mode=3,
        )
        builder.output(graph_io.ATTENTION, "float32", ["sentences", config.heads, "width", "source_positions"])
        return builder.node("Transpose", [attended_SHWE], perm=[0, 2, 1, 3])

    def head(self, hidden_RD: str) -> None:
        """Find the best continuations of each row."""
        builder, vocabulary_size = self.builder, self.config.vocabulary_size
        block = _block(vocabulary_size)
        padding = -vocabulary_size % block if block else 0
        logits_RV = self.products.project(builder, hidden_RD, padding, graph_io.LOGITS)
        log_probs_RV = builder.node("LogSoftmax", [logits_RV], axis=-1)
        if block:
            self._best_of_blocks(log_probs_RV, block, (vocabulary_size + padding) // block)
        else:
            best = [graph_io.LOG_PROBS, graph_io.TOKENS]
            builder.nodes("TopK", [log_probs_RV, graph_io.K], best, axis=-1, largest=1, sorted=1)
        builder.output(graph_io.LOGITS, "float32", ["rows", vocabulary_size + padding])
        builder.output(graph_io.LOG_PROBS, "float32", ["rows", "candidates"])
        builder.output(graph_io.TOKENS, "int64", ["rows", "candidates"])

    def _best_of_blocks(self, log_probs_RV: str, block: int, blocks: int) -> None:
        """Find the k best tokens among the k blocks of the largest maxima, which hold them: half the time of TopK
        over the vocabulary. The blocks are put in order, so that of equal tokens the smaller one comes first.

        Shape suffixes: C blocks of B tokens.
        """
        builder, k_1 = self.builder, graph_io.K
        log_probs_RCB = builder.node("Reshape", [log_probs_RV, builder.constant([0, blocks, block])])
        largest_RC = builder.node("ReduceMax", [log_probs_RCB, builder.constant([2])], keepdims=0)
        _, chosen_RK = builder.nodes("TopK", [largest_RC, k_1], ["", ""], axis=-1, sorted=0)
        chosen_RK, _ = builder.nodes("TopK", [chosen_RK, k_1], ["", ""], axis=-1, largest=0)
        index_RK1 = builder.node("Unsqueeze", [chosen_RK, builder.constant([2])])
        found_RKB = builder.node("GatherND", [log_probs_RCB, index_RK1], batch_dims=1)
        found = builder.node("Reshape", [found_RKB, builder.constant([0, -1])])
        _, place_RK = builder.nodes("TopK", [found, k_1], [graph_io.LOG_PROBS, ""], axis=-1)
        rank_RK = builder.node("Div", [place_RK, builder.constant([block])])
        block_RK = builder.node("GatherElements", [chosen_RK, rank_RK], axis=1)
        shift_RK = builder.node("Mul", [builder.node("Sub", [block_RK, rank_RK]), builder.constant([block])])
        builder.node("Add", [place_RK, shift_RK], name=graph_io.TOKENS)


def _block(vocabulary_size: int) -> int:
    """Return how many tokens a block of the vocabulary holds, 0 if there would be too few blocks."""
    block = 64 if vocabulary_size >= 16_384 else 32
    return block if vocabulary_size >= _FEWEST_BLOCKS * block else 0
