"""Decoding with the Transformer itself: for validation during training, and to check an export against.

Shape suffixes: S sentences, W rows of each, R = S * W rows, L source positions, H heads, E head width, D model width, V
vocabulary, K candidates per row.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ferryman_service.domain.tokens import PAD
from ferryman_service.model.attention import CrossAttention, KeysValues, split_heads
from ferryman_service.model.transformer import Transformer, source_mask
from ferryman_service.search.decoder import Candidates


class TorchDecoder:
    """A search.Decoder over a Transformer, on the Transformer's device.

    The Transformer must be in evaluation mode while a batch lives, else dropout would change its answers.
    """

    def __init__(self, transformer: Transformer) -> None:
        self._transformer = transformer

    def batch(self, width: int, *, attention: bool = False) -> TorchBatch:
        """Return an empty batch with `width` rows per sentence."""
        return TorchBatch(self._transformer, width, attention=attention)


class TorchBatch:
    """A search.RunningBatch over a Transformer, whose sentences come all at once: only an empty batch admits."""

    def __init__(self, transformer: Transformer, width: int, *, attention: bool) -> None:
        self._transformer = transformer
        self._width = width
        self._sentences = 0
        self._position = 0
        self._cross: list[KeysValues] = []
        self._cache: list[KeysValues] = []
        self._mask_S11L: Tensor | None = None
        self._watch = AttentionWatch(transformer) if attention else None

    @property
    def width(self) -> int:
        """W."""
        return self._width

    @property
    def sentences(self) -> int:
        """S."""
        return self._sentences

    @property
    def size_bytes(self) -> int:
        """How much memory the caches take."""
        return sum(tensor.nbytes for both in (self._cross, self._cache) for pair in both for tensor in pair)

    @torch.inference_mode()
    def admit(self, sources: Sequence[Sequence[int]]) -> None:
        """Encode sentences (subword ids, end symbol included, none empty); the batch must be empty."""
        assert not self._sentences, "sentences join an empty batch only"
        assert not self._transformer.training, "call eval() first: dropout would change the translations"
        source_SL = torch.full((len(sources), max(map(len, sources))), PAD)
        for row_L, source in zip(source_SL, sources, strict=True):
            row_L[: len(source)] = torch.as_tensor(source)
        source_SL = source_SL.to(self._device)
        self._cross = self._transformer.cross_keys_values(self._transformer.encode(source_SL))
        self._mask_S11L = source_mask(source_SL)
        self._cache = self._transformer.empty_cache(len(sources) * self._width)
        self._sentences, self._position = len(sources), 0

    @torch.inference_mode()
    def keep(self, kept_S: NDArray[np.int64]) -> None:
        """Let all other sentences leave; see search.RunningBatch."""
        index_S = torch.from_numpy(kept_S).to(self._device)
        self._cross = _select(self._cross, index_S)
        self._mask_S11L = None if self._mask_S11L is None else self._mask_S11L[index_S]
        rows_SW = kept_S[:, None] * self._width + np.arange(self._width)
        self._cache = _select(self._cache, torch.from_numpy(rows_SW.ravel()).to(self._device))
        self._sentences = len(kept_S)

    @torch.inference_mode()
    def step(self, tokens_SW: NDArray[np.int64], parents_SW: NDArray[np.int64], k: int) -> Candidates:
        """Feed one token to each row; see search.RunningBatch."""
        log_probs_RK, tokens_RK = _best(self._feed(tokens_SW, parents_SW).log_softmax(dim=-1), k)
        shape = *tokens_SW.shape, -1
        return Candidates(log_probs_RK.reshape(shape), tokens_RK.reshape(shape))

    @torch.inference_mode()
    def step_logits(self, tokens_SW: NDArray[np.int64], parents_SW: NDArray[np.int64]) -> NDArray[np.float32]:
        """Feed one token to each row; return the raw logits_SWV."""
        logits_RV: NDArray[np.float32] = self._feed(tokens_SW, parents_SW).cpu().numpy()
        return logits_RV.reshape(*tokens_SW.shape, -1)

    def attention(self) -> NDArray[np.float32]:
        """Return what each row of the last step paid attention to, weights_SWL."""
        assert self._watch is not None, "the batch was made without attention"
        weights_SWL: NDArray[np.float32] = self._watch.weights_SWL.cpu().numpy()
        return weights_SWL

    @property
    def _device(self) -> torch.device:
        return self._transformer.embedding.weight.device

    def _feed(self, tokens_SW: NDArray[np.int64], parents_SW: NDArray[np.int64]) -> Tensor:
        """Take a step and return logits_RV in 32 bits."""
        own_W = np.arange(self._width)
        if self._position and not (parents_SW == own_W).all():
            rows_SW = np.arange(self._sentences)[:, None] * self._width + parents_SW
            self._cache = _select(self._cache, torch.from_numpy(rows_SW.ravel()).to(self._device))
        token_R = torch.from_numpy(tokens_SW.ravel()).to(self._device)
        step = self._transformer.decode_step if self._watch is None else self._watch.decode_step
        hidden_RD, self._cache = step(token_R, self._position, self._cache, self._cross, self._mask_S11L)
        self._position += 1
        return self._transformer.project(hidden_RD).float()


class AttentionWatch:
    """Takes decoder steps and looks at the attention to the source in the last layer, which the layer keeps to itself:
    its weights are computed a second time."""

    weights_SWL: Tensor
    """Of the last step: mean over the heads, 0 at padding."""

    def __init__(self, transformer: Transformer) -> None:
        self._transformer = transformer
        self._module = transformer.get_submodule(
            f"decoder_layers.{transformer.config.decoder_layers - 1}.cross_attention"
        )

    def decode_step(
        self,
        token_R: Tensor,
        position: int,
        past: Sequence[KeysValues],
        source: Sequence[KeysValues],
        mask_S11L: Tensor | None,
    ) -> tuple[Tensor, list[KeysValues]]:
        """As Transformer.decode_step."""
        thread = threading.get_ident()

        def look(module: torch.nn.Module, arguments: tuple[Tensor, KeysValues, Tensor | None]) -> None:
            if threading.get_ident() == thread:  # others may use the same Transformer
                assert isinstance(module, CrossAttention)
                self.weights_SWL = _weights(module, self._transformer.config.heads, *arguments)

        handle = self._module.register_forward_pre_hook(look)
        try:
            return self._transformer.decode_step(token_R, position, past, source, mask_S11L)
        finally:
            handle.remove()


def _weights(
    attention: CrossAttention, heads: int, x_SWD: Tensor, source: KeysValues, mask_S11L: Tensor | None
) -> Tensor:
    """Return weights_SWL, the mean over the heads."""
    query_SHWE = split_heads(attention.query(x_SWD), heads)
    scores_SHWL = query_SHWE @ source.keys_BHSE.transpose(2, 3) / math.sqrt(query_SHWE.shape[3])
    if mask_S11L is not None:
        scores_SHWL = scores_SHWL.masked_fill(~mask_S11L, -math.inf)
    return scores_SHWL.float().softmax(dim=-1).mean(dim=1)


def _select(caches: Sequence[KeysValues], index_B: Tensor) -> list[KeysValues]:
    return [KeysValues(*(tensor.index_select(0, index_B) for tensor in cache)) for cache in caches]


def _best(log_probs_RV: Tensor, k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return the k best tokens of each row, equal ones by the smaller token, which torch.topk does not promise."""
    vocabulary_size = log_probs_RV.shape[1]
    k = min(k, vocabulary_size)
    values, tokens = log_probs_RV.topk(min(k + 1, vocabulary_size), dim=-1)
    if bool((values[:, 1:] == values[:, :-1]).any()):
        values, tokens = log_probs_RV.sort(dim=-1, descending=True, stable=True)
    return values[:, :k].cpu().numpy(), tokens[:, :k].cpu().numpy()
