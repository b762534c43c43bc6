"""The encoder-decoder Transformer.

Shape suffixes: B sentences, S source positions, T target positions, R rows (hypotheses being extended), N any
positions, D model width, V vocabulary. Masks are True where a position may be attended to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ferryman_service.domain.recipe import NormPlacement, Positions
from ferryman_service.domain.tokens import PAD
from ferryman_service.model.attention import KeysValues
from ferryman_service.model.config import TransformerConfig
from ferryman_service.model.dropout import Dropout
from ferryman_service.model.layers import DecoderLayer, EncoderLayer, deep_norm
from ferryman_service.model.positions import SinusoidalPositions

# Drawn wider than this, post-norm attention is so sharp from the start that it never finds the source.
_ATTENTION_GAIN = 2**-0.5
_ATTENTION_BLOCKS = {"query_key_value": ("query", "key", "value"), "key_value": ("key", "value"), "query": ("query",)}


class Transformer(nn.Module):
    """Source tokens and the target's beginning in, logits of the target's next token out.

    One matrix embeds source and target and projects to the vocabulary (Press and Wolf, 2017; section 3.4 of the paper).
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary_size, config.d_model)
        self.positions = SinusoidalPositions(config.d_model) if config.positions is Positions.SINUSOIDAL else None
        self.dropout = Dropout(config.dropout)
        self.encoder_layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.decoder_layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        pre = config.norm is NormPlacement.PRE
        self.encoder_norm = nn.LayerNorm(config.d_model) if pre else nn.Identity()
        self.decoder_norm = nn.LayerNorm(config.d_model) if pre else nn.Identity()
        self._initialise()

    def forward(self, source_BS: Tensor, target_input_BT: Tensor) -> Tensor:
        """Return logits_BTV; `target_input_BT` starts with BOS.

        Tokens are int64, sentences are padded at their end with PAD, and none is all padding.
        """
        return self.project(self.hidden(source_BS, target_input_BT))

    def hidden(self, source_BS: Tensor, target_input_BT: Tensor) -> Tensor:
        """Return hidden_BTD, what `project` turns into logits: project only the positions that are needed."""
        return self.decode_hidden(target_input_BT, self.encode(source_BS), source_mask(source_BS))

    def encode(self, source_BS: Tensor) -> Tensor:
        """Return memory_BSD; its padded positions hold nothing of use."""
        return self.encode_masked(source_BS, source_mask(source_BS))

    def encode_masked(self, source_BS: Tensor, mask_B11S: Tensor | None) -> Tensor:
        """Return memory_BSD; the mask is False at padding, None if nothing is padded."""
        x_BSD = self.embed(source_BS)
        for layer in self.encoder_layers:
            x_BSD = layer(x_BSD, mask_B11S)
        memory_BSD: Tensor = self.encoder_norm(x_BSD)
        return memory_BSD

    def decode_hidden(self, target_input_BT: Tensor, memory_BSD: Tensor, mask_B11S: Tensor | None) -> Tensor:
        """Return hidden_BTD of whole target sentences; the mask is `source_mask` of the source."""
        x_BTD = self.embed(target_input_BT)
        for layer, source in zip(self.decoder_layers, self.cross_keys_values(memory_BSD), strict=True):
            x_BTD = layer(x_BTD, source, mask_B11S)
        hidden_BTD: Tensor = self.decoder_norm(x_BTD)
        return hidden_BTD

    def cross_keys_values(self, memory_BSD: Tensor) -> list[KeysValues]:
        """Return each decoder layer's keys and values of the encoded source."""
        return [layer.cross_attention.keys_values(memory_BSD) for layer in self._decoder()]

    def empty_cache(self, rows: int) -> list[KeysValues]:
        """Return the self-attention keys and values of rows that have no position yet, one pair a decoder layer."""
        empty = self.embedding.weight.new_empty(rows, self.config.heads, 0, self.config.head_dim)
        return [KeysValues(empty, empty)] * self.config.decoder_layers

    def decode_step(
        self,
        token_R: Tensor,
        position: int,
        past: Sequence[KeysValues],
        source: Sequence[KeysValues],
        mask_B11S: Tensor | None,
    ) -> tuple[Tensor, list[KeysValues]]:
        """Feed one token to each row; return hidden_RD and the cache with position `position` (from 0) appended.

        The rows hold equally many rows of each sentence, a sentence's rows together, in the order of `source`.
        """
        x_RD = self.embed(token_R[:, None], position)[:, 0]
        present = []
        for layer, past_of_layer, source_of_layer in zip(self._decoder(), past, source, strict=True):
            x_RD, present_of_layer = layer.forward_step(x_RD, past_of_layer, source_of_layer, mask_B11S)
            present.append(present_of_layer)
        return self.decoder_norm(x_RD), present

    def embed(self, token_BT: Tensor, first_position: int = 0) -> Tensor:
        """Return the embedded tokens x_BTD, scaled by sqrt(d_model), with positions added."""
        x_BTD = F.embedding(token_BT, self.embedding.weight) * math.sqrt(self.config.d_model)
        if self.positions is not None:
            x_BTD = x_BTD + self.positions(first_position, token_BT.shape[1])
        embedded_BTD: Tensor = self.dropout(x_BTD)
        return embedded_BTD

    def project(self, hidden_ND: Tensor) -> Tensor:
        """Return logits_NV for any leading shape."""
        return F.linear(hidden_ND, self.embedding.weight)

    def _decoder(self) -> list[DecoderLayer]:
        return [layer for layer in self.decoder_layers if isinstance(layer, DecoderLayer)]

    def _initialise(self) -> None:
        """Draw the weights: embedding N(0, d_model^-0.5), matrices Xavier uniform, biases 0, norms 1.

        A packed matrix is drawn block by block: query, key and value are matrices of their own, with gain 1/sqrt(2).
        DEEP multiplies the gains of feed-forward, value and output matrices by beta.
        """
        deep = deep_norm(self.config)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
                beta = deep.encoder_beta if name.startswith("encoder") else deep.decoder_beta
                for block, gain in _blocks(module.weight, name.rpartition(".")[2], self.config.ffn_dim, beta):
                    nn.init.xavier_uniform_(block, gain=gain)
        nn.init.normal_(self.embedding.weight, std=self.config.d_model**-0.5)


def _blocks(weight: Tensor, kind: str, ffn_dim: int, beta: float) -> list[tuple[Tensor, float]]:
    """Return the matrices that one is packed of, each with its gain."""
    if kind in _ATTENTION_BLOCKS:
        names = _ATTENTION_BLOCKS[kind]
        gains = [_ATTENTION_GAIN * (beta if name == "value" else 1.0) for name in names]
        return list(zip(weight.chunk(len(names)), gains, strict=True))
    return [(block, beta) for block in (torch.split(weight, ffn_dim) if kind == "inner" else [weight])]


def source_mask(source_BS: Tensor) -> Tensor | None:
    """Return mask_B11S, False at padding; None if nothing is padded.

    On a GPU nobody looks whether something is padded: the look would wait for the GPU's queue to drain.
    """
    if source_BS.device.type == "cpu" and bool((source_BS != PAD).all()):
        return None
    return (source_BS != PAD)[:, None, None, :]
