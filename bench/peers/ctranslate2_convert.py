"""Writes the weights of one of our bundles as a CTranslate2 model, through CTranslate2's public converter API. Runs in
an environment of its own, which `peers.environment` makes:

    python -m bench.peers.ctranslate2_convert BUNDLE FOLDER [--quantization int8]

Shape suffixes: T positions, D model width.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import ctranslate2  # type: ignore[import-not-found]
import numpy as np
import sentencepiece
from ctranslate2.specs import common_spec, transformer_spec  # type: ignore[import-not-found]
from numpy.typing import NDArray
from safetensors.numpy import load_file

Weights = Mapping[str, NDArray[np.float32]]

_UNK, _BOS, _EOS = 1, 2, 3  # as in ferryman_service.domain.tokens
_MIN_POSITIONS: Final = 512
_ACTIVATIONS: Final = {"relu": common_spec.Activation.RELU, "gelu": common_spec.Activation.GELU}
_LEGAL: Final = {"norm": ("post", "pre"), "activation": tuple(_ACTIVATIONS), "positions": ("sinusoidal",)}


class NotConvertible(Exception):
    """The model has something that CTranslate2's Transformer has not, or that this converter leaves out."""


class BundleConverter(ctranslate2.converters.Converter):  # type: ignore[misc]
    """Converts a bundle that holds weights. Raises NotConvertible where it is used."""

    def __init__(self, bundle: Path) -> None:
        super().__init__()
        self._bundle = bundle

    def _load(self) -> transformer_spec.TransformerSpec:
        header = json.loads((self._bundle / "manifest.json").read_text())["header"]
        model = header["lineage"]["recipe"]["model"]
        check_convertible(model)
        weights = load_file(self._bundle / "weights.safetensors")
        spec = transformer_spec.TransformerSpec.from_config(
            (model["encoder_layers"], model["decoder_layers"]),
            model["heads"],
            pre_norm=model["norm"] == "pre",
            activation=_ACTIVATIONS[model["activation"]],
        )
        positions_TD = sinusoids(max(_MIN_POSITIONS, header["max_sentence_tokens"] + 1), model["d_model"])
        for side in ("encoder", "decoder"):
            _fill_side(getattr(spec, side), side, weights, positions_TD, pre_norm=model["norm"] == "pre")
        spec.decoder.projection.weight = weights["embedding.weight"]
        _set_vocabulary(spec, self._bundle / "subwords.model")
        return spec


def check_convertible(model: Mapping[str, Any]) -> None:
    """Raise NotConvertible unless every part of a recipe's model can be expressed."""
    for name, legal in _LEGAL.items():
        if model[name] not in legal:
            raise NotConvertible(f"{name} is {model[name]!r}: only {' and '.join(legal)} can be converted")


def sinusoids(length: int, d_model: int) -> NDArray[np.float32]:
    """Return positions_TD as ferryman_service.model.positions has them: sine and cosine of one angle side by side."""
    frequency = np.exp(np.arange(0, d_model, 2) * (-np.log(10_000.0) / d_model))
    angle = np.arange(length)[:, None] * frequency
    table_TD: NDArray[np.float32] = np.stack((np.sin(angle), np.cos(angle)), -1).reshape(length, d_model)
    return table_TD.astype(np.float32)


def _fill_side(
    stack: Any,  # noqa: ANN401
    side: str,
    weights: Weights,
    positions_TD: NDArray[np.float32],
    *,
    pre_norm: bool,
) -> None:
    embeddings = stack.embeddings[0] if side == "encoder" else stack.embeddings
    embeddings.weight = weights["embedding.weight"]
    stack.scale_embeddings = True
    stack.position_encodings.encodings = positions_TD
    if pre_norm:
        _norm(stack.layer_norm, weights, f"{side}_norm")
    for number, layer in enumerate(stack.layer):
        name = f"{side}_layers.{number}"
        _linear(layer.self_attention.linear[0], weights, f"{name}.self_attention.query_key_value")
        _linear(layer.self_attention.linear[1], weights, f"{name}.self_attention.output")
        _norm(layer.self_attention.layer_norm, weights, f"{name}.self_attention_residual.norm")
        if side == "decoder":
            for index, part in enumerate(("query", "key_value", "output")):
                _linear(layer.attention.linear[index], weights, f"{name}.cross_attention.{part}")
            _norm(layer.attention.layer_norm, weights, f"{name}.cross_attention_residual.norm")
        _linear(layer.ffn.linear_0, weights, f"{name}.feed_forward.inner")
        _linear(layer.ffn.linear_1, weights, f"{name}.feed_forward.outer")
        _norm(layer.ffn.layer_norm, weights, f"{name}.feed_forward_residual.norm")


def _linear(spec: Any, weights: Weights, name: str) -> None:  # noqa: ANN401
    spec.weight = weights[f"{name}.weight"]
    spec.bias = weights[f"{name}.bias"]


def _norm(spec: Any, weights: Weights, name: str) -> None:  # noqa: ANN401
    spec.gamma = weights[f"{name}.weight"]
    spec.beta = weights[f"{name}.bias"]


def _set_vocabulary(spec: transformer_spec.TransformerSpec, subwords: Path) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(subwords))
    pieces = [processor.IdToPiece(token) for token in range(processor.GetPieceSize())]
    spec.register_source_vocabulary(pieces)
    spec.register_target_vocabulary(pieces)
    spec.config.decoder_start_token = spec.config.bos_token = pieces[_BOS]
    spec.config.eos_token = pieces[_EOS]
    spec.config.unk_token = pieces[_UNK]
    spec.config.add_source_bos = spec.config.add_source_eos = False


def main() -> None:
    """Convert."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("folder", type=Path, help="is replaced")
    parser.add_argument("--quantization", choices=("int8",), help="of the stored weights (default: none, FP32)")
    arguments = parser.parse_args()
    try:
        BundleConverter(arguments.bundle).convert(
            str(arguments.folder), quantization=arguments.quantization, force=True
        )
    except (NotConvertible, OSError) as error:
        sys.exit(f"ctranslate2_convert: {arguments.bundle}: {error}")


if __name__ == "__main__":
    main()
