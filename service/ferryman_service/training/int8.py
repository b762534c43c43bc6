"""Matrix products in 8 bits: weights with a scale for each column, activations with a scale that is fixed at export.

Activations could be measured as they come, but over a batch that would make a sentence's numbers depend on its
neighbours, and row by row it costs more than the product saves on small models. So their range is measured on
held-out sentences, and cut where the squared error is least.

Weights keep 7 of the 8 bits: processors without VNNI add pairs of products in 16 bits, and 255 * 64 * 2 is the most
that fits. The same file then gives the same numbers on every processor.

Shape suffixes: N rows or any numbers, D inputs of a product, O its outputs, F feed-forward width, B bins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ferryman_service.domain.tokens import BOS
from ferryman_service.model.transformer import Transformer
from ferryman_service.training.graph_builder import CONTRIB, GraphBuilder
from ferryman_service.training.graphs import PROJECTION, Weights, padded_projection, padding_bias

_WEIGHT_MAX: Final = 64
_MIDDLE: Final = 128
"""The zero point of activations of either sign; those of a ReLU have 0."""
_BINS: Final = 2048
_CUTS: Final = np.linspace(0.2, 1.0, 65)
_SMALLEST: Final = 1e-8
_SUM_LIMIT: Final = 2**30
_BIAS_LIMIT: Final = 1e25
"""What the padding of the vocabulary has as its bias here: its scale must be a float32 for ranges from 1e-8 on."""

Ranges = Mapping[str, float]
"""The largest magnitude that is told apart, of the input of each product by the path of its weights."""


class Int8Products:
    """Products of the graphs in 8 bits, with float32 in between."""

    element_type: Final = "float32"

    def __init__(self, weights: Weights, ranges: Ranges) -> None:
        self._weights = weights
        self._ranges = ranges

    def linear(self, builder: GraphBuilder, x_ND: str, module: str) -> str:
        """Return x_ND times the module's matrix plus its bias, as float32."""
        weight_OD, bias_O = self._weights[f"{module}.weight"], self._weights[f"{module}.bias"]
        quantized, scale = self._quantize(builder, x_ND, module)
        return _product(builder, quantized, scale, weight_OD, bias_O)

    def project(self, builder: GraphBuilder, x_ND: str, padding: int, name: str) -> str:
        """Return x_ND times the embedding matrix, with so many more columns that are the least there is."""
        weight_OD = padded_projection(self._weights, padding).T
        quantized, scale = self._quantize(builder, x_ND, PROJECTION)
        return _product(builder, quantized, scale, weight_OD, padding_bias(self._weights, padding), name=name)

    def feed_forward_relu(self, builder: GraphBuilder, x_ND: str, inner: str, outer: str) -> str:
        """Return outer(ReLU(inner(x_ND))): what is negative becomes 0 because 8 unsigned bits hold nothing less."""
        scale = self._ranges[outer] / 255
        hidden = [_scalar(builder, scale), builder.constant(np.array(0, np.uint8))]
        quantized, entered_scale = self._quantize(builder, x_ND, inner)
        matrices = [(self._weights[f"{name}.weight"], self._weights[f"{name}.bias"]) for name in (inner, outer)]
        hidden_NF = _product(builder, quantized, entered_scale, *matrices[0], result=hidden)
        return _product(builder, [hidden_NF, *hidden], scale, *matrices[1])

    def _quantize(self, builder: GraphBuilder, x_ND: str, module: str) -> tuple[list[str], float]:
        """Return the rows in 8 bits with their scale and zero point, and the scale's value."""
        value = 2 * self._ranges[module] / 255
        scale, zero = _scalar(builder, value), builder.constant(np.array(_MIDDLE, np.uint8))
        return [builder.node("QuantizeLinear", [x_ND, scale, zero]), scale, zero], value


def _product(
    builder: GraphBuilder,
    quantized: Sequence[str],
    scale: float,
    weight_OD: NDArray[np.float32],
    bias_O: NDArray[np.float32],
    *,
    name: str = "",
    result: Sequence[str] = (),
) -> str:
    """Return quantized rows (values, scale, zero point) times a matrix plus a bias: as float32, or in 8 bits if
    `result` names a scale and a zero point."""
    largest_O = np.abs(weight_OD).max(axis=1)
    clipped_O = np.clip(bias_O.astype(np.float64), -_BIAS_LIMIT, _BIAS_LIMIT)
    scale_O = np.where(largest_O > 0, largest_O, np.float32(1)) / np.float32(_WEIGHT_MAX)
    # Where weights are so small that their steps could not add up to the bias, the steps are larger.
    scale_O = np.maximum(scale_O, np.abs(clipped_O) / (scale * _SUM_LIMIT)).astype(np.float32)
    weight_DO = np.ascontiguousarray(np.rint(weight_OD / scale_O[:, None]).astype(np.int8).T)
    sum_O = np.clip(np.rint(clipped_O / (scale * scale_O.astype(np.float64))), -_SUM_LIMIT, _SUM_LIMIT).astype(np.int32)
    weight = [builder.constant(value) for value in (weight_DO, scale_O, np.zeros(len(scale_O), np.int8))]
    return builder.node("QGemm", [*quantized, *weight, builder.constant(sum_O), *result], name=name, domain=CONTRIB)


def measure_ranges(transformer: Transformer, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Ranges:
    """Return the range of every product's input, measured on pairs of a source (with its end symbol) and a target
    (without symbols)."""
    largest: dict[str, float] = {}
    counts: dict[str, NDArray[np.int64]] = {}

    def note_largest(name: str, magnitude_N: NDArray[np.float32]) -> None:
        largest[name] = max(float(magnitude_N.max()), largest.get(name, _SMALLEST))

    def count(name: str, magnitude_N: NDArray[np.float32]) -> None:
        counts[name] = counts.get(name, 0) + np.histogram(magnitude_N, bins=_BINS, range=(0.0, largest[name]))[0]

    _watch_inputs(transformer, pairs, note_largest)
    largest = {name: _rounded_up(value) for name, value in largest.items()}
    _watch_inputs(transformer, pairs, count)
    return {name: _best_range(counts[name], largest[name]) for name in counts}


def _watch_inputs(
    transformer: Transformer,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    note: Callable[[str, NDArray[np.float32]], None],
) -> None:
    """Run the pairs and tell the magnitudes of every product's input."""

    def tell(name: str, x: Tensor) -> None:
        note(name, x.detach().abs().flatten().numpy())

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, inputs: tell(name, inputs[0])

    linears = [(name, module) for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    hooks = [module.register_forward_pre_hook(watch(name)) for name, module in linears]
    try:
        with torch.inference_mode():
            for source, target in pairs:
                tell(PROJECTION, transformer.hidden(torch.tensor([list(source)]), torch.tensor([[BOS, *target]])))
    finally:
        for hook in hooks:
            hook.remove()


def _rounded_up(value: float) -> float:
    """Return the next number of three digits: what PyTorch's threads round differently must not make other files."""
    digit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return math.ceil(value / digit) * digit


def _best_range(count_B: NDArray[np.int64], largest: float) -> float:
    """Return the range for which rounding to 127 steps and cutting off what is beyond has the least squared error. The
    magnitudes are counted in equal bins from 0 to the largest."""
    middle_B = (np.arange(_BINS) + 0.5) * largest / _BINS
    errors = []
    for cut in _CUTS * largest:
        rounding = (cut / 127) ** 2 / 12
        beyond_B = np.maximum(middle_B - cut, 0.0)
        errors.append(float((count_B * (beyond_B**2 + rounding * (beyond_B == 0))).sum()))
    return float(_CUTS[int(np.argmin(errors))] * largest)


def _scalar(builder: GraphBuilder, value: float) -> str:
    return builder.constant(np.array(value, np.float32))
