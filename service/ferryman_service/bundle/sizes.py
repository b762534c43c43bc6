"""How many numbers the parts of a network have, so that a file which claims more is refused before it is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ferryman_service.bundle.graph_io import MAX_TARGET_LENGTH, cache_width
from ferryman_service.domain.recipe import Activation, ModelRecipe

MOST_PADDING: Final = 64
"""Columns that a graph may have behind the vocabulary, at most."""


@dataclass(frozen=True, kw_only=True)
class NetworkSize:
    """Upper bounds of the numbers in a network's graphs, embedding and weights; small constants are not counted."""

    network: ModelRecipe
    vocabulary_size: int
    max_sentence_tokens: int

    @property
    def head_dim(self) -> int:
        """The width of one attention head."""
        return self.network.d_model // self.network.heads

    @property
    def embedding(self) -> int:
        """Numbers of the embedding matrix."""
        return self.vocabulary_size * self.network.d_model

    @property
    def encoder(self) -> int:
        """Numbers of the encoder's graph: its layers, the decoder's cross-attention projections, rotations."""
        width, network = self.network.d_model, self.network
        layer = self._attention(width) + self._feed_forward() + 4 * width
        keys_and_values = 2 * width * (width + 1)
        rotations = self.max_sentence_tokens * self.head_dim
        return network.encoder_layers * layer + network.decoder_layers * keys_and_values + 2 * width + rotations

    @property
    def decoder(self) -> int:
        """Numbers of the decoder's graph: its layers, the embedding with its padding, rotations."""
        width, network = self.network.d_model, self.network
        self_attention = self._attention(network.heads * cache_width(self.head_dim))
        layer = self_attention + self._attention(width) + self._feed_forward() + 6 * width
        projection = (self.vocabulary_size + MOST_PADDING) * (width + 1)
        return network.decoder_layers * layer + projection + 2 * width + MAX_TARGET_LENGTH * self.head_dim

    @property
    def weights(self) -> int:
        """Numbers of the trained weights."""
        return self.encoder + self.decoder + self.embedding

    def _attention(self, heads_width: int) -> int:
        """Return the numbers of query, key, value and output projections; `heads_width` is that of all heads."""
        return heads_width * (4 * self.network.d_model + 3) + self.network.d_model

    def _feed_forward(self) -> int:
        inner = self.network.ffn_dim * (2 if self.network.activation is Activation.SWIGLU else 1)
        return inner * (self.network.d_model + 1) + self.network.ffn_dim * self.network.d_model + self.network.d_model
