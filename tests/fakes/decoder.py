"""A search.Decoder whose model is a function from a prefix to log-probabilities."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from ferryman_service.domain.tokens import BOS, EOS
from ferryman_service.search.decoder import Candidates

NextLogProbs = Callable[[Sequence[int], Sequence[int]], NDArray[np.float32]]
"""(source, target prefix with BOS) -> log-probabilities of every next token."""


class FakeDecoder:
    def __init__(self, next_log_probs: NextLogProbs) -> None:
        self._next_log_probs = next_log_probs
        self.batches: list[FakeBatch] = []

    def batch(self, width: int, *, attention: bool = False) -> FakeBatch:
        self.batches.append(FakeBatch(self._next_log_probs, width, attention=attention))
        return self.batches[-1]


class FakeBatch:
    """Keeps prefixes instead of caches, and asserts what a RunningBatch may rely on. `row_counts` records how many rows
    each step had. What a step returned is overwritten by the next one."""

    def __init__(self, next_log_probs: NextLogProbs, width: int, *, attention: bool) -> None:
        assert width >= 1
        self._next_log_probs = next_log_probs
        self._attention = attention
        self._sources: list[tuple[int, ...]] = []
        self._prefixes: list[list[tuple[int, ...]]] = []
        self._returned: list[NDArray[np.generic]] = []
        self.width = width
        self.row_counts: list[int] = []

    @property
    def sentences(self) -> int:
        return len(self._sources)

    def admit(self, sources: Sequence[Sequence[int]]) -> None:
        assert all(source and source[-1] == EOS for source in sources)
        self._sources.extend(map(tuple, sources))
        self._prefixes.extend([()] * self.width for _ in sources)

    def keep(self, kept_S: NDArray[np.int64]) -> None:
        assert kept_S.dtype == np.int64
        kept = kept_S.tolist()
        assert kept == sorted(set(kept)) and set(kept) <= set(range(self.sentences))
        self._sources = [self._sources[sentence] for sentence in kept]
        self._prefixes = [self._prefixes[sentence] for sentence in kept]

    def step(self, tokens_SW: NDArray[np.int64], parents_SW: NDArray[np.int64], k: int) -> Candidates:
        log_probs_SWV = self._feed(tokens_SW, parents_SW)
        tokens_SWK = np.argsort(-log_probs_SWV, axis=2, kind="stable")[:, :, :k]
        log_probs_SWK = np.take_along_axis(log_probs_SWV, tokens_SWK, axis=2)
        self._returned = [log_probs_SWK, tokens_SWK]
        return Candidates(log_probs_SWK, tokens_SWK)

    def step_logits(self, tokens_SW: NDArray[np.int64], parents_SW: NDArray[np.int64]) -> NDArray[np.float32]:
        logits_SWV = fake_logits(self._feed(tokens_SW, parents_SW))
        self._returned = [logits_SWV]
        return logits_SWV

    def attention(self) -> NDArray[np.float32]:
        assert self._attention
        attention_SWL = np.zeros((self.sentences, self.width, max(map(len, self._sources))), dtype=np.float32)
        for sentence, (source, prefixes) in enumerate(zip(self._sources, self._prefixes, strict=True)):
            for row, prefix in enumerate(prefixes):
                attention_SWL[sentence, row, : len(source)] = fake_attention(source, prefix)
        self._returned.append(attention_SWL)
        return attention_SWL

    def _feed(self, tokens_SW: NDArray[np.int64], parents_SW: NDArray[np.int64]) -> NDArray[np.float32]:
        self._check(tokens_SW, parents_SW)
        self.row_counts.append(tokens_SW.size)
        self._prefixes = [
            [(*prefixes[parent], token) for token, parent in zip(tokens, parents, strict=True)]
            for prefixes, tokens, parents in zip(self._prefixes, tokens_SW.tolist(), parents_SW.tolist(), strict=True)
        ]
        rows = [
            [self._next_log_probs(source, prefix) for prefix in prefixes]
            for source, prefixes in zip(self._sources, self._prefixes, strict=True)
        ]
        log_probs_SWV = np.array(rows, dtype=np.float32)
        assert tokens_SW.min() >= 0 and tokens_SW.max() < log_probs_SWV.shape[2]
        return log_probs_SWV

    def _check(self, tokens_SW: NDArray[np.int64], parents_SW: NDArray[np.int64]) -> None:
        for array in self._returned:
            array.fill(99 if array.dtype == np.int64 else np.nan)
        assert self.sentences > 0
        for array_SW in (tokens_SW, parents_SW):
            assert array_SW.shape == (self.sentences, self.width)
            assert array_SW.dtype == np.int64
            assert array_SW.flags.c_contiguous
        assert parents_SW.min() >= 0 and parents_SW.max() < self.width
        for prefixes, tokens in zip(self._prefixes, tokens_SW.tolist(), strict=True):
            assert (prefixes[0] == ()) == (tokens == [BOS] * self.width)


def fake_logits(log_probs: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return logits of a fake model: its log-probabilities, moved so that some are positive."""
    return log_probs + np.float32(1.5)


def fake_attention(source: Sequence[int], prefix: Sequence[int]) -> NDArray[np.float32]:
    """Return the weights over the source positions after a prefix: any, but most on one position."""
    weights = np.full(len(source), 0.5 / len(source), dtype=np.float32)
    weights[hash((tuple(source), tuple(prefix))) % len(source)] += 0.5
    return weights


def random_model(seed: int, vocabulary_size: int, *, sharpness: float = 2.0, levels: int = 0) -> NextLogProbs:
    """Return a model with random log-probabilities; with `levels`, logits are rounded so that many are equal."""

    @functools.cache
    def log_probs(source: tuple[int, ...], prefix: tuple[int, ...]) -> NDArray[np.float32]:
        generator = np.random.default_rng([seed, *source, 1_000_003, *prefix])
        logits = generator.normal(size=vocabulary_size) * sharpness
        if levels:
            logits = np.round(logits * levels) / levels
        return (logits - np.log(np.exp(logits).sum())).astype(np.float32)

    def next_log_probs(source: Sequence[int], prefix: Sequence[int]) -> NDArray[np.float32]:
        return log_probs(tuple(source), tuple(prefix))

    return next_log_probs
