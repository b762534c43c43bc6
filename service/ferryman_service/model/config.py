"""The numbers that define a Transformer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ferryman_service.domain.recipe import Activation, NormPlacement, Positions, Recipe


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """The network with its real vocabulary size, which may be smaller than the recipe asked for.

    `dropout` follows embeddings and sublayers, `attention_dropout` attention weights, `activation_dropout` the ReLU.
    """

    d_model: int
    encoder_layers: int
    decoder_layers: int
    heads: int
    ffn_dim: int
    dropout: float
    attention_dropout: float
    activation_dropout: float
    norm: NormPlacement
    vocabulary_size: int
    activation: Activation = Activation.RELU
    positions: Positions = Positions.SINUSOIDAL

    def __post_init__(self) -> None:
        assert self.d_model % self.heads == 0, f"{self.heads} heads do not divide d_model {self.d_model}"
        assert self.d_model % 2 == 0, f"d_model {self.d_model} must be even: sines and cosines come in pairs"
        assert self.vocabulary_size > 0, "the vocabulary is empty"

    @property
    def head_dim(self) -> int:
        """The width of one attention head."""
        return self.d_model // self.heads

    @classmethod
    def from_recipe(cls, recipe: Recipe, vocabulary_size: int) -> TransformerConfig:
        """Return the recipe's network over a vocabulary of that size."""
        return cls(**dataclasses.asdict(recipe.model), vocabulary_size=vocabulary_size)

    def to_dict(self) -> dict[str, Any]:
        """Return the config as JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TransformerConfig:
        """Return the config that `to_dict` wrote."""
        enums = {"norm": NormPlacement, "activation": Activation, "positions": Positions}
        return cls(**{**values, **{name: kind(values[name]) for name, kind in enums.items() if name in values}})
