"""Decoding with the plain loop's model: the same search as ours, over a model that computes every prefix anew.

Shape suffixes: S sentences, W rows of each, R = S * W rows, L source positions, T positions of the prefix, D model
width, V vocabulary, K candidates per row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.peers.plain_loop import PlainTransformer, padded
from ferryman_service.domain.tokens import PAD
from ferryman_service.search.decoder import Candidates


class PlainDecoder:
    """A search.Decoder over a PlainTransformer, which must be in evaluation mode."""

    def __init__(self, model: PlainTransformer) -> None:
        self._model = model

    def batch(self, width: int, *, attention: bool = False) -> PlainBatch:
        """Return an empty batch with `width` rows per sentence."""
        assert not attention, "the plain loop's model shows no attention"
        return PlainBatch(self._model, width)


class PlainBatch:
    """A search.RunningBatch over a PlainTransformer. Only an empty batch admits sentences."""

    def __init__(self, model: PlainTransformer, width: int) -> None:
        self._model = model
        self._width = width
        self._memory_SLD = torch.empty(0)
        self._padding_SL = torch.empty(0, dtype=torch.bool)
        self._prefix_SWT = torch.empty((0, width, 0), dtype=torch.int64)

    @property
    def width(self) -> int:
        """W."""
        return self._width

    @property
    def sentences(self) -> int:
        """S."""
        return len(self._prefix_SWT)

    @property
    def size_bytes(self) -> int:
        """How much memory the encoded sentences and the prefixes take."""
        return self._memory_SLD.nbytes + self._padding_SL.nbytes + self._prefix_SWT.nbytes

    @torch.inference_mode()
    def admit(self, sources: Sequence[Sequence[int]]) -> None:
        """Encode sentences (subword ids, end symbol included, none empty); the batch must be empty."""
        assert not self.sentences, "sentences join an empty batch only"
        assert not self._model.training, "call eval() first: dropout would change the translations"
        source_SL = padded(sources)
        self._memory_SLD = self._model.encode(source_SL)
        self._padding_SL = source_SL == PAD
        self._prefix_SWT = torch.empty((len(sources), self._width, 0), dtype=torch.int64)

    def keep(self, kept_S: NDArray[np.int64]) -> None:
        """Let all other sentences leave; see search.RunningBatch."""
        index_S = torch.from_numpy(kept_S)
        self._memory_SLD = self._memory_SLD[index_S]
        self._padding_SL = self._padding_SL[index_S]
        self._prefix_SWT = self._prefix_SWT[index_S]

    @torch.inference_mode()
    def step(self, tokens_SW: NDArray[np.int64], parents_SW: NDArray[np.int64], k: int) -> Candidates:
        """Feed one token to each row; see search.RunningBatch."""
        log_probs_RV = self._feed(tokens_SW, parents_SW).log_softmax(dim=-1)
        log_probs_RK, tokens_RK = log_probs_RV.topk(min(k, log_probs_RV.shape[1]), dim=-1)
        shape = *tokens_SW.shape, -1
        return Candidates(log_probs_RK.reshape(shape).numpy(), tokens_RK.reshape(shape).numpy())

    @torch.inference_mode()
    def step_logits(self, tokens_SW: NDArray[np.int64], parents_SW: NDArray[np.int64]) -> NDArray[np.float32]:
        """Feed one token to each row; return the raw logits_SWV."""
        logits_RV: NDArray[np.float32] = self._feed(tokens_SW, parents_SW).numpy()
        return logits_RV.reshape(*tokens_SW.shape, -1)

    def attention(self) -> NDArray[np.float32]:
        """Return nothing: no batch is made with attention."""
        raise AssertionError("the plain loop's model shows no attention")

    def _feed(self, tokens_SW: NDArray[np.int64], parents_SW: NDArray[np.int64]) -> Tensor:
        """Append a token to each row's prefix and return logits_RV."""
        parents_SW1 = torch.from_numpy(parents_SW)[:, :, None]
        parents_SWT = parents_SW1.expand(-1, -1, self._prefix_SWT.shape[2])
        own_SWT = self._prefix_SWT.gather(1, parents_SWT)
        self._prefix_SWT = torch.cat((own_SWT, torch.from_numpy(tokens_SW)[:, :, None]), dim=2)
        return self._model.next_logits(
            self._prefix_SWT.flatten(0, 1),
            self._memory_SLD.repeat_interleave(self._width, dim=0),
            self._padding_SL.repeat_interleave(self._width, dim=0),
        )
