"""A running batch and the naive one beside each other: random lives that both go through, and the comparison."""

import numpy as np
from hypothesis import strategies as st

from ferryman_service.domain.tokens import BOS
from tests.fakes.random_network import NaiveBatch, random_sources


class Both:
    """Drives a batch and the naive one with the same random moves, and compares what they answer."""

    def __init__(self, ours, network, seed, *, logits=False, attention=False, tolerance=1e-4):
        self.ours = ours
        self.naive = NaiveBatch(network, ours.width)
        self._vocabulary_size = network.config.vocabulary_size
        self._random = np.random.default_rng(seed)
        self._width, self._logits, self._attends = ours.width, logits, attention
        self._tolerance = tolerance

    @property
    def sentences(self):
        return self.naive.sentences

    def admit(self, count, longest):
        self.admit_sources(random_sources(count, longest, self._vocabulary_size, int(self._random.integers(2**32))))

    def admit_sources(self, sources):
        self.ours.admit(sources)
        self.naive.admit(sources)
        assert self.ours.sentences == self.naive.sentences

    def keep(self, kept_S):
        self.ours.keep(kept_S)
        self.naive.keep(kept_S)

    def leave(self, share):
        """Let each sentence leave with a probability."""
        self.keep(np.flatnonzero(self._random.random(self.sentences) >= share))

    def step(self):
        shape = self.sentences, self._width
        fresh_S1 = np.array(self.naive.lengths())[:, None] == 0
        token_SW = np.where(fresh_S1, BOS, self._random.integers(4, self._vocabulary_size, shape))
        parent_SW = np.where(
            fresh_S1 | (self._random.random((self.sentences, 1)) < 0.3),
            np.arange(self._width),  # nobody moves
            self._random.integers(0, self._width, shape),
        )
        logits_SWV = self.naive.step_logits(token_SW, parent_SW)
        if self._logits:
            found_SWV = self.ours.step_logits(token_SW, parent_SW)
            np.testing.assert_allclose(found_SWV, logits_SWV, atol=self._tolerance)
        else:
            self._compare_candidates(self.ours.step(token_SW, parent_SW, 7), logits_SWV)
        if self._attends:
            wanted_SWL, found_SWL = self.naive.attention(), self.ours.attention()
            length = wanted_SWL.shape[2]
            np.testing.assert_allclose(found_SWL[:, :, :length], wanted_SWL, atol=self._tolerance)
            assert not found_SWL[:, :, length:].any(), "nobody attends to padding"

    def _compare_candidates(self, found, logits_SWV):
        log_probs_SWV = logits_SWV - np.log(np.exp(logits_SWV).sum(axis=2, keepdims=True))
        assert found.tokens_SWK.shape == found.log_probs_SWK.shape == (self.sentences, self._width, 7)
        assert (found.tokens_SWK.dtype, found.log_probs_SWK.dtype) == (np.int64, np.float32)
        asked_SWK = np.take_along_axis(log_probs_SWV, found.tokens_SWK, axis=2)
        np.testing.assert_allclose(found.log_probs_SWK, asked_SWK, atol=self._tolerance)
        best_SWK = -np.sort(-log_probs_SWV, axis=2)[:, :, :7]
        np.testing.assert_allclose(found.log_probs_SWK, best_SWK, atol=self._tolerance)


MOVES = st.lists(
    st.tuples(
        st.integers(0, 6),  # sentences that join
        st.sampled_from([1, 3, 9, 40, 100]),  # the longest of them, source tokens
        st.sampled_from([0.0, 0.0, 0.3, 0.9, 1.0]),  # the share that leaves
        st.integers(1, 6),  # steps
    ),
    min_size=2,
    max_size=8,
)


def live(both, moves):
    """Let a batch go through moves: who joins, who leaves, how many steps."""
    for joining, longest, share, steps in moves:
        if joining:
            both.admit(joining, longest)
        if both.sentences:
            both.leave(share)
        for _ in range(steps if both.sentences else 0):
            both.step()
