"""Multi-head attention (Vaswani et al., 2017, section 3.2).

Shape suffixes: B sentences, T positions that ask, S positions that are asked, D model width, H heads, E head width.
Masks are True where a position may be attended to, as in torch's scaled_dot_product_attention.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ferryman_service.domain.recipe import Positions
from ferryman_service.model.config import TransformerConfig
from ferryman_service.model.positions import SinusoidalPositions, rotate


class KeysValues(NamedTuple):
    """What attention asks: keys_BHSE and values_BHSE."""

    keys_BHSE: Tensor
    values_BHSE: Tensor


class SelfAttention(nn.Module):
    """Attention of a sequence to itself; queries, keys and values come from one matrix product."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self._heads = config.heads
        self._dropout = config.attention_dropout
        self.query_key_value = nn.Linear(config.d_model, 3 * config.d_model)
        self.output = nn.Linear(config.d_model, config.d_model)
        self.rotation = SinusoidalPositions(config.head_dim) if config.positions is Positions.ROPE else None

    def forward(self, x_BTD: Tensor, mask_B11T: Tensor | None) -> Tensor:
        """Return the attended x_BTD; every position sees all positions that the mask allows (None: all)."""
        query_BHTE, keys_values = self.project(x_BTD)
        dropout = self._dropout if self.training else 0.0
        attended_BHTE = F.scaled_dot_product_attention(query_BHTE, *keys_values, attn_mask=mask_B11T, dropout_p=dropout)
        return self._leave(attended_BHTE)

    def forward_causal(self, x_BTD: Tensor) -> Tensor:
        """Return the attended x_BTD; a position sees itself and what stands before it.

        No padding mask is needed: padding stands at the end, where no real position looks.
        """
        query_BHTE, keys_values = self.project(x_BTD)
        dropout = self._dropout if self.training else 0.0
        attended_BHTE = F.scaled_dot_product_attention(query_BHTE, *keys_values, dropout_p=dropout, is_causal=True)
        return self._leave(attended_BHTE)

    def forward_step(self, x_B1D: Tensor, past: KeysValues) -> tuple[Tensor, KeysValues]:
        """Return the attended x_B1D of one new position, and the keys and values with its own appended."""
        query_BH1E, new = self.project(x_B1D, first_position=past.keys_BHSE.shape[2])
        present = KeysValues(*(torch.cat(pair, dim=2) for pair in zip(past, new, strict=True)))
        return self._leave(F.scaled_dot_product_attention(query_BH1E, *present)), present

    def project(self, x_BTD: Tensor, first_position: int = 0) -> tuple[Tensor, KeysValues]:
        """Return query_BHTE with the keys and values of the same positions, rotated if the recipe says so."""
        batch, length, d_model = x_BTD.shape
        packed = self.query_key_value(x_BTD).view(batch, length, 3, self._heads, d_model // self._heads)
        query_BHTE, keys_BHTE, values_BHTE = packed.permute(2, 0, 3, 1, 4).unbind(0)
        if self.rotation is not None:
            sinusoids_TE = self.rotation(first_position, length)
            query_BHTE, keys_BHTE = rotate(query_BHTE, sinusoids_TE), rotate(keys_BHTE, sinusoids_TE)
        return query_BHTE, KeysValues(keys_BHTE, values_BHTE)

    def _leave(self, attended_BHTE: Tensor) -> Tensor:
        x_BTD: Tensor = self.output(join_heads(attended_BHTE))
        return x_BTD


class CrossAttention(nn.Module):
    """Attention of the target to the encoded source. Keys and values depend on the source alone: computed once."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self._heads = config.heads
        self._dropout = config.attention_dropout
        self.query = nn.Linear(config.d_model, config.d_model)
        self.key_value = nn.Linear(config.d_model, 2 * config.d_model)
        self.output = nn.Linear(config.d_model, config.d_model)

    def keys_values(self, memory_BSD: Tensor) -> KeysValues:
        """Return the keys and values of the encoded source."""
        batch, length, d_model = memory_BSD.shape
        packed = self.key_value(memory_BSD).view(batch, length, 2, self._heads, d_model // self._heads)
        return KeysValues(*packed.permute(2, 0, 3, 1, 4).unbind(0))

    def forward(self, x_BTD: Tensor, source: KeysValues, mask_B11S: Tensor | None) -> Tensor:
        """Return x_BTD attended to the source positions that the mask allows (None: all)."""
        dropout = self._dropout if self.training else 0.0
        attended_BHTE = F.scaled_dot_product_attention(
            split_heads(self.query(x_BTD), self._heads), *source, attn_mask=mask_B11S, dropout_p=dropout
        )
        answer_BTD: Tensor = self.output(join_heads(attended_BHTE))
        return answer_BTD


def split_heads(x_BTD: Tensor, heads: int) -> Tensor:
    """Return x_BHTE."""
    batch, length, d_model = x_BTD.shape
    return x_BTD.view(batch, length, heads, d_model // heads).transpose(1, 2)


def join_heads(x_BHTE: Tensor) -> Tensor:
    """Return x_BTD."""
    return x_BHTE.transpose(1, 2).flatten(2)
