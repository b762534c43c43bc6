"""The layers of encoder and decoder (Vaswani et al., 2017, section 3.1; pre-norm: Xiong et al., 2020).

Shape suffixes: B sentences, T target positions, S source positions, R rows (hypotheses being extended), D model width.
Masks are True where a position may be attended to.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from ferryman_service.domain.recipe import Activation, NormPlacement
from ferryman_service.model.attention import CrossAttention, KeysValues, SelfAttention
from ferryman_service.model.config import TransformerConfig
from ferryman_service.model.dropout import Dropout


@dataclass(frozen=True, kw_only=True)
class DeepNorm:
    """What the residual is multiplied by, and the gain of feed-forward, value and output matrices at the start."""

    encoder_alpha: float = 1.0
    encoder_beta: float = 1.0
    decoder_alpha: float = 1.0
    decoder_beta: float = 1.0


def deep_norm(config: TransformerConfig) -> DeepNorm:
    """Return the constants of an encoder-decoder (Wang et al., 2022, figure 2); all 1 unless the norm is DEEP."""
    if config.norm is not NormPlacement.DEEP:
        return DeepNorm()
    encoder, decoder = config.encoder_layers, config.decoder_layers
    product = (encoder**4 * decoder) ** (1 / 16)
    return DeepNorm(
        encoder_alpha=0.81 * product,
        encoder_beta=0.87 / product,
        decoder_alpha=(3 * decoder) ** 0.25,
        decoder_beta=(12 * decoder) ** -0.25,
    )


class FeedForward(nn.Module):
    """Two linear maps with an activation between them, at every position.

    With SWIGLU the first map is twice as wide: gate, then what is gated.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self._activation = config.activation
        maps = 2 if config.activation is Activation.SWIGLU else 1
        self.inner = nn.Linear(config.d_model, maps * config.ffn_dim)
        self.outer = nn.Linear(config.ffn_dim, config.d_model)
        self.dropout = Dropout(config.activation_dropout)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return x_BTD."""
        answer_BTD: Tensor = self.outer(self.dropout(self._activate(self.inner(x_BTD))))
        return answer_BTD

    def _activate(self, inner: Tensor) -> Tensor:
        match self._activation:
            case Activation.RELU:
                return F.relu(inner)
            case Activation.GELU:
                return F.gelu(inner)
            case Activation.SWIGLU:
                gate, gated = inner.chunk(2, dim=-1)
                return F.silu(gate) * gated


class Residual(nn.Module):
    """A sublayer's shell. POST: LayerNorm(x + Dropout(sublayer(x))). PRE: x + Dropout(sublayer(LayerNorm(x))). DEEP:
    LayerNorm(alpha x + Dropout(sublayer(x)))."""

    def __init__(self, config: TransformerConfig, alpha: float) -> None:
        super().__init__()
        self._pre = config.norm is NormPlacement.PRE
        self._alpha = alpha
        self.norm = nn.LayerNorm(config.d_model)
        self.dropout = Dropout(config.dropout)

    def enter(self, x_BTD: Tensor) -> Tensor:
        """Return what the sublayer is given."""
        return self._normalised(x_BTD) if self._pre else x_BTD

    def leave(self, x_BTD: Tensor, answer_BTD: Tensor) -> Tensor:
        """Return x_BTD joined with the sublayer's answer."""
        if self._alpha != 1.0:
            x_BTD = self._alpha * x_BTD
        sum_BTD: Tensor = x_BTD + self.dropout(answer_BTD)
        return sum_BTD if self._pre else self._normalised(sum_BTD)

    def _normalised(self, x_BTD: Tensor) -> Tensor:
        normalised_BTD: Tensor = self.norm(x_BTD)
        return normalised_BTD


class EncoderLayer(nn.Module):
    """Self-attention, then feed-forward."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        alpha = deep_norm(config).encoder_alpha
        self.self_attention = SelfAttention(config)
        self.self_attention_residual = Residual(config, alpha)
        self.feed_forward = FeedForward(config)
        self.feed_forward_residual = Residual(config, alpha)

    def forward(self, x_BSD: Tensor, mask_B11S: Tensor | None) -> Tensor:
        """Return x_BSD."""
        residual = self.self_attention_residual
        x_BSD = residual.leave(x_BSD, self.self_attention(residual.enter(x_BSD), mask_B11S))
        residual = self.feed_forward_residual
        return residual.leave(x_BSD, self.feed_forward(residual.enter(x_BSD)))


class DecoderLayer(nn.Module):
    """Causal self-attention, attention to the source, then feed-forward."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        alpha = deep_norm(config).decoder_alpha
        self.self_attention = SelfAttention(config)
        self.self_attention_residual = Residual(config, alpha)
        self.cross_attention = CrossAttention(config)
        self.cross_attention_residual = Residual(config, alpha)
        self.feed_forward = FeedForward(config)
        self.feed_forward_residual = Residual(config, alpha)

    def forward(self, x_BTD: Tensor, source: KeysValues, mask_B11S: Tensor | None) -> Tensor:
        """Return x_BTD of whole sequences."""
        residual = self.self_attention_residual
        x_BTD = residual.leave(x_BTD, self.self_attention.forward_causal(residual.enter(x_BTD)))
        return self._attend_to_source(x_BTD, source, mask_B11S)

    def forward_step(
        self, x_RD: Tensor, past: KeysValues, source: KeysValues, mask_B11S: Tensor | None
    ) -> tuple[Tensor, KeysValues]:
        """Return x_RD of one new position a row, and the self-attention cache with that position appended.

        The R rows hold equally many rows of each of the B sentences, a sentence's rows together. In attention to the
        source they stand where positions stand, so that a sentence's keys and values serve all its rows uncopied.
        """
        residual = self.self_attention_residual
        answer_R1D, present = self.self_attention.forward_step(residual.enter(x_RD)[:, None], past)
        x_RD = residual.leave(x_RD, answer_R1D[:, 0])
        x_BTD = x_RD.view(source.keys_BHSE.shape[0], -1, x_RD.shape[1])
        return self._attend_to_source(x_BTD, source, mask_B11S).flatten(0, 1), present

    def _attend_to_source(self, x_BTD: Tensor, source: KeysValues, mask_B11S: Tensor | None) -> Tensor:
        residual = self.cross_attention_residual
        x_BTD = residual.leave(x_BTD, self.cross_attention(residual.enter(x_BTD), source, mask_B11S))
        residual = self.feed_forward_residual
        return residual.leave(x_BTD, self.feed_forward(residual.enter(x_BTD)))
