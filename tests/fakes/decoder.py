"""A search.Decoder whose model is a function from a prefix to log-probabilities."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from ferryman_service.domain.tokens import EOS
from ferryman_service.search.decoder import Candidates
from ferryman_service.search.rows import SentenceRows

NextLogProbs = Callable[[Sequence[int], Sequence[int]], NDArray[np.float32]]
"""(source, target prefix with BOS) -> log-probabilities of every next token."""


class FakeDecoder:
    def __init__(self, next_log_probs: NextLogProbs) -> None:
        self._next_log_probs = next_log_probs
        self.sessions: list[FakeSession] = []

    def encode(self, sources: Sequence[Sequence[int]]) -> FakeSession:
        self.sessions.append(FakeSession(self._next_log_probs, sources))
        return self.sessions[-1]


class FakeSession:
    """Keeps prefixes instead of caches. `row_counts` records how many rows each step had."""

    def __init__(self, next_log_probs: NextLogProbs, sources: Sequence[Sequence[int]]) -> None:
        assert all(source and source[-1] == EOS for source in sources)
        self._next_log_probs = next_log_probs
        self._prefixes = [(tuple(source), ()) for source in sources]
        self._rows = SentenceRows(len(sources))
        self.row_counts: list[int] = []

    def step(self, tokens_R: NDArray[np.int64], parents_R: NDArray[np.int64], k: int) -> Candidates:
        assert tokens_R.dtype == parents_R.dtype == np.int64
        self._rows.follow(parents_R)
        self.row_counts.append(len(tokens_R))
        parents = [self._prefixes[parent] for parent in parents_R]
        self._prefixes = [
            (source, (*prefix, int(token))) for (source, prefix), token in zip(parents, tokens_R, strict=True)
        ]
        log_probs_RV = np.stack([self._next_log_probs(*row) for row in self._prefixes])
        order_RK = np.argsort(-log_probs_RV, axis=1, kind="stable")[:, :k]
        return Candidates(np.take_along_axis(log_probs_RV, order_RK, axis=1), order_RK)


def random_model(seed: int, vocabulary_size: int, *, sharpness: float = 2.0, levels: int = 0) -> NextLogProbs:
    """Return a model with random log-probabilities; with `levels`, logits are rounded so that many are equal."""

    def next_log_probs(source: Sequence[int], prefix: Sequence[int]) -> NDArray[np.float32]:
        generator = np.random.default_rng([seed, *source, 1_000_003, *prefix])
        logits = generator.normal(size=vocabulary_size) * sharpness
        if levels:
            logits = np.round(logits * levels) / levels
        return (logits - np.log(np.exp(logits).sum())).astype(np.float32)

    return next_log_probs
