"""The two halves of translating as modules that can be exported as graphs: no Python decision depends on a value.

Shape suffixes: S sentences, L source positions, W rows per sentence, R = S * W rows, P rows of the step before, T
target positions, D model width, H heads, E head width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ferryman_service.domain.recipe import Positions
from ferryman_service.domain.tokens import PAD
from ferryman_service.model.attention import CrossAttention, SelfAttention, join_heads
from ferryman_service.model.layers import DecoderLayer
from ferryman_service.model.positions import SinusoidalPositions, rotate, sinusoids
from ferryman_service.model.transformer import Transformer


class EncoderGraph(nn.Module):
    """Encodes sentences of at most `max_length` tokens down to what the decoder asks of them."""

    def __init__(self, transformer: Transformer, max_length: int) -> None:
        super().__init__()
        self.transformer = transformer
        for module in transformer.modules():
            if isinstance(module, SinusoidalPositions):
                module(0, max_length)  # a table that had to grow later would be a decision in the graph

    def forward(self, source_SL: Tensor) -> tuple[Tensor, ...]:
        """Return bias_S11L (0, at padding -inf), then keys_SHEL and values_SHLE of each decoder layer in turn."""
        mask_S11L = (source_SL != PAD)[:, None, None, :]
        memory_SLD = self.transformer.encode_masked(source_SL, mask_S11L)
        outputs = [torch.where(mask_S11L, 0.0, -torch.inf)]
        for keys_SHLE, values_SHLE in self.transformer.cross_keys_values(memory_SLD):
            outputs += [keys_SHLE.transpose(2, 3).contiguous(), values_SHLE.contiguous()]
        return tuple(outputs)


class DecoderGraph(nn.Module):
    """Takes one of at most `max_length` steps with all rows."""

    positions_TD: Tensor
    rotation_TE: Tensor

    def __init__(self, transformer: Transformer, max_length: int) -> None:
        super().__init__()
        self.transformer = transformer
        config = transformer.config
        self._rotates = config.positions is Positions.ROPE
        if self._rotates:
            self.register_buffer("rotation_TE", sinusoids(max_length, config.head_dim))
        else:
            self.register_buffer("positions_TD", sinusoids(max_length, config.d_model))

    def forward(
        self,
        token_SW: Tensor,
        parent_SW: Tensor,
        position_1: Tensor,
        bias_S11L: Tensor,
        cross: list[Tensor],
        past: list[Tensor],
    ) -> tuple[Tensor, ...]:
        """Return log_probs_RV, then the self-attention's keys_RHTE and values_RHTE of each layer with the new position.

        `cross` is what EncoderGraph returned after the bias. `past` holds keys_PHTE and values_PHTE of each layer;
        parent_SW says which of its rows each row continues.
        """
        transformer = self.transformer
        x_RD = transformer.embedding(token_SW.flatten()) * transformer.config.d_model**0.5
        rotation_1E = self.rotation_TE.index_select(0, position_1) if self._rotates else None
        if not self._rotates:
            x_RD = x_RD + self.positions_TD.index_select(0, position_1)
        parent_R = parent_SW.flatten()
        present: list[Tensor] = []
        for index, layer in enumerate(transformer.decoder_layers):
            assert isinstance(layer, DecoderLayer)
            keys, values = past[2 * index : 2 * index + 2]
            residual = layer.self_attention_residual
            entered_RD = residual.enter(x_RD)
            answer_RD, *cache = _self_attention(layer.self_attention, entered_RD, parent_R, keys, values, rotation_1E)
            present += cache
            x_RD = residual.leave(x_RD, answer_RD)
            residual = layer.cross_attention_residual
            keys, values = cross[2 * index : 2 * index + 2]
            query_SWD = layer.cross_attention.query(residual.enter(x_RD)).reshape(*token_SW.shape, -1)
            answer_RD = _cross_attention(layer.cross_attention, query_SWD, keys, values, bias_S11L)
            x_RD = residual.leave(x_RD, answer_RD)
            residual = layer.feed_forward_residual
            x_RD = residual.leave(x_RD, layer.feed_forward(residual.enter(x_RD)))
        hidden_RD = transformer.decoder_norm(x_RD)
        return (transformer.project(hidden_RD).log_softmax(dim=-1), *present)


def _self_attention(
    attention: SelfAttention,
    x_RD: Tensor,
    parent_R: Tensor,
    keys_PHTE: Tensor,
    values_PHTE: Tensor,
    rotation_1E: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the answer_RD, and keys_RHTE and values_RHTE with the new position at their end."""
    _, heads, _, head_dim = keys_PHTE.shape
    query_RD, key_RD, value_RD = attention.query_key_value(x_RD).chunk(3, dim=-1)
    query_RH1E = (query_RD * head_dim**-0.5).reshape(-1, heads, 1, head_dim)
    key_RH1E = key_RD.reshape(-1, heads, 1, head_dim)
    if rotation_1E is not None:
        query_RH1E, key_RH1E = rotate(query_RH1E, rotation_1E), rotate(key_RH1E, rotation_1E)
    keys_RHTE = torch.cat((keys_PHTE.index_select(0, parent_R), key_RH1E), dim=2)
    values_RHTE = torch.cat((values_PHTE.index_select(0, parent_R), value_RD.reshape(-1, heads, 1, head_dim)), dim=2)
    weights_RH1T = (query_RH1E @ keys_RHTE.transpose(2, 3)).softmax(dim=-1)
    attended_RD = (weights_RH1T @ values_RHTE).reshape(-1, heads * head_dim)
    return attention.output(attended_RD), keys_RHTE, values_RHTE


def _cross_attention(
    attention: CrossAttention, query_SWD: Tensor, keys_SHEL: Tensor, values_SHLE: Tensor, bias_S11L: Tensor
) -> Tensor:
    """Return the answer_RD; a sentence's rows stand where positions stand, so its keys and values serve them all."""
    _, heads, head_dim, _ = keys_SHEL.shape
    query_SHWE = (query_SWD * head_dim**-0.5).unflatten(-1, (heads, head_dim)).transpose(1, 2)
    weights_SHWL = (query_SHWE @ keys_SHEL + bias_S11L).softmax(dim=-1)
    attended_RD = join_heads(weights_SHWL @ values_SHLE).flatten(0, 1)
    answer_RD: Tensor = attention.output(attended_RD)
    return answer_RD
