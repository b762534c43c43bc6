"""Decoding with the Transformer itself: for validation during training, and to check an export against.

Shape suffixes: S sentences, L source positions, R rows, V vocabulary, K candidates per row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ferryman_service.domain.tokens import PAD
from ferryman_service.model.attention import KeysValues
from ferryman_service.model.transformer import Transformer, source_mask
from ferryman_service.search.decoder import Candidates
from ferryman_service.search.rows import SentenceRows


class TorchDecoder:
    """A search.Decoder over a Transformer, on the Transformer's device.

    The Transformer must be in evaluation mode while a session lives, else dropout would change its answers.
    """

    def __init__(self, transformer: Transformer) -> None:
        self._transformer = transformer

    @torch.inference_mode()
    def encode(self, sources: Sequence[Sequence[int]]) -> TorchSession:
        """Encode sentences (subword ids, end symbol included, none empty)."""
        assert not self._transformer.training, "call eval() first: dropout would change the translations"
        device = self._transformer.embedding.weight.device
        source_SL = torch.full((len(sources), max(map(len, sources))), PAD)
        for row_L, source in zip(source_SL, sources, strict=True):
            row_L[: len(source)] = torch.as_tensor(source)
        source_SL = source_SL.to(device)
        cross = self._transformer.cross_keys_values(self._transformer.encode(source_SL))
        return TorchSession(self._transformer, cross, source_mask(source_SL))


class TorchSession:
    """A search.DecodingSession over a Transformer."""

    def __init__(self, transformer: Transformer, cross: Sequence[KeysValues], mask_S11L: Tensor | None) -> None:
        sentences = cross[0].keys_BHSE.shape[0]
        self._transformer = transformer
        self._cross = cross
        self._mask_S11L = mask_S11L
        self._cache = transformer.empty_cache(sentences)
        self._rows = SentenceRows(sentences)
        self._position = 0

    @torch.inference_mode()
    def step(self, tokens_R: NDArray[np.int64], parents_R: NDArray[np.int64], k: int) -> Candidates:
        """Feed one token to each row; see search.DecodingSession."""
        device = self._transformer.embedding.weight.device
        self._reorder(parents_R, device)
        token_R = torch.from_numpy(tokens_R).to(device)
        hidden_RD, self._cache = self._transformer.decode_step(
            token_R, self._position, self._cache, self._cross, self._mask_S11L
        )
        self._position += 1
        return _best(self._transformer.project(hidden_RD).float().log_softmax(dim=-1), k)

    def _reorder(self, parents_R: NDArray[np.int64], device: torch.device) -> None:
        stays_S = self._rows.follow(parents_R)
        if not np.array_equal(parents_R, np.arange(self._cache[0].keys_BHSE.shape[0])):
            self._cache = _select(self._cache, torch.from_numpy(parents_R).to(device))
        if stays_S is not None:
            index_S = torch.from_numpy(stays_S).to(device)
            self._cross = _select(self._cross, index_S)
            self._mask_S11L = None if self._mask_S11L is None else self._mask_S11L[index_S]


def _select(caches: Sequence[KeysValues], index_B: Tensor) -> list[KeysValues]:
    return [KeysValues(*(tensor.index_select(0, index_B) for tensor in cache)) for cache in caches]


def _best(log_probs_RV: Tensor, k: int) -> Candidates:
    """Return the k best tokens of each row, equal ones by the smaller token, which torch.topk does not promise."""
    vocabulary_size = log_probs_RV.shape[1]
    k = min(k, vocabulary_size)
    values, tokens = log_probs_RV.topk(min(k + 1, vocabulary_size), dim=-1)
    if bool((values[:, 1:] == values[:, :-1]).any()):
        values, tokens = log_probs_RV.sort(dim=-1, descending=True, stable=True)
    return Candidates(values[:, :k].cpu().numpy(), tokens[:, :k].cpu().numpy())
