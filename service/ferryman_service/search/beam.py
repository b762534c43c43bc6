"""Beam search; greedy search is a beam of one.

At every step the candidates of a sentence are all continuations of its rows, best first by log-probability; equal ones
by row, then by token. Of the first 2 * beam_size candidates, those that end the sentence and stand among the first
beam_size become finished hypotheses, and the first beam_size that do not end it become the next rows: a finished
hypothesis leaves no gap. PAD and BOS are never candidates. UNK is: where a model asks for it, it knows nothing better.

A hypothesis's score is log_probability / length ** length_penalty. The length counts subwords and, where it was
reached, the end symbol. A sentence is done

* with a beam of one: when its hypothesis has ended;
* else when beam_size hypotheses have finished and no row can still yield one that belongs among the n_best. A row of
  log-probability p (never above 0, and it only falls) that would end with length l, t < l <= max_length, scores at most
  p / l ** length_penalty, which is largest at one of the two ends of that range;
* at its maximum length, where rows that have not ended are cut. They come after all finished hypotheses.

Shape suffixes: S sentences that are not done, W rows per sentence, R = S * W rows, K candidates per row, C = W * K
candidates per sentence, M the best of them, T positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ferryman_service.domain.tokens import BOS, EOS, PAD
from ferryman_service.search.decoder import Candidates, DecodingSession

_NEVER_CHOSEN = 2  # PAD and BOS may take places among a row's candidates


@dataclass(frozen=True, kw_only=True)
class BeamOptions:
    """How to search: rows per sentence, hypotheses wanted, exponent of the length in the score."""

    beam_size: int
    n_best: int
    length_penalty: float

    def __post_init__(self) -> None:
        assert 1 <= self.n_best <= self.beam_size, f"n_best {self.n_best} must be 1 to beam_size {self.beam_size}"


@dataclass(frozen=True, kw_only=True)
class RawHypothesis:
    """A found target sentence: tokens without start and end symbols; `finished` if the end symbol was reached."""

    tokens: tuple[int, ...]
    log_probability: float
    score: float
    finished: bool

    @property
    def length(self) -> int:
        """Subwords, the end symbol included if it was reached."""
        return len(self.tokens) + self.finished


def search(
    session: DecodingSession,
    options: BeamOptions,
    max_lengths_S: NDArray[np.int64],
    check: Callable[[], None],
) -> list[list[RawHypothesis]]:
    """Return at most n_best hypotheses for each sentence of a new session, best first.

    `max_lengths_S` (each at least 1) bounds the length as RawHypothesis counts it. `check` is called before every step
    and may raise, to stop the search. A sentence's result depends on the session's answers for its own rows alone.
    """
    beams = _Beams(options, max_lengths_S)
    while beams.rows:
        check()
        beams.advance(session.step(beams.tokens_R, beams.parents_R, beams.candidates_per_row))
    return beams.results()


class _Beams:
    """The rows of all sentences, and the hypotheses found so far."""

    def __init__(self, options: BeamOptions, max_lengths_S: NDArray[np.int64]) -> None:
        sentences = len(max_lengths_S)
        assert sentences == 0 or max_lengths_S.min() >= 1, "a maximum length is below 1"
        self._options = options
        self._max_length_S = np.asarray(max_lengths_S, dtype=np.int64)
        self._sentence_S = np.arange(sentences)
        self._length = 0
        self._log_prob_SW = np.zeros((sentences, 1))
        self._history_RT = np.empty((sentences, 0), dtype=np.int64)
        self._finished: list[list[RawHypothesis]] = [[] for _ in range(sentences)]
        self._cut: list[list[RawHypothesis]] = [[] for _ in range(sentences)]
        self._enough_S = np.zeros(sentences, dtype=bool)
        self._score_to_beat_S = np.full(sentences, -np.inf)
        self.candidates_per_row = 2 * options.beam_size + _NEVER_CHOSEN
        self.tokens_R = np.full(sentences, BOS, dtype=np.int64)
        self.parents_R = np.arange(sentences)

    @property
    def rows(self) -> int:
        """How many rows are being extended."""
        return len(self.tokens_R)

    def advance(self, candidates: Candidates) -> None:
        """Take one step: finish what ends, keep the best rows of the rest, let sentences leave that are done."""
        self._length += 1
        log_prob_SM, token_SM, parent_SM = self._best(candidates)
        ends_SM = token_SM == EOS
        self._finish(log_prob_SM, ends_SM, parent_SM)

        # A row ends in at most one way, so the candidates hold enough that go on, the same number for every sentence.
        going_on = min(self._options.beam_size, token_SM.shape[1] - self._log_prob_SW.shape[1])
        keep_SW = np.argsort(ends_SM, axis=1, kind="stable")[:, :going_on]
        self._log_prob_SW = np.take_along_axis(log_prob_SM, keep_SW, axis=1)
        token_SW = np.take_along_axis(token_SM, keep_SW, axis=1)
        parent_SW = np.take_along_axis(parent_SM, keep_SW, axis=1)

        done_S = self._is_done()
        cut_S = (self._length == self._max_length_S) & ~done_S
        self._cut_off(np.flatnonzero(cut_S), token_SW, parent_SW)
        self._keep_sentences(~(done_S | cut_S), token_SW, parent_SW)

    def results(self) -> list[list[RawHypothesis]]:
        """Return the n_best hypotheses of every sentence: finished ones before cut ones, then by score."""
        n_best = self._options.n_best
        return [(finished + cut)[:n_best] for finished, cut in zip(self._finished, self._cut, strict=True)]

    def _best(self, candidates: Candidates) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
        """Return each sentence's best candidates: log-probability of the whole hypothesis, token, parent row."""
        sentences, width = self._log_prob_SW.shape
        token_RK = candidates.tokens_RK
        log_prob_RK = np.where((token_RK == PAD) | (token_RK == BOS), -np.inf, candidates.log_probs_RK)
        total_SC = (log_prob_RK + self._log_prob_SW.reshape(-1, 1)).reshape(sentences, -1)
        best_SM = np.argsort(-total_SC, axis=1, kind="stable")[:, : 2 * self._options.beam_size]
        first_row_S1 = np.arange(0, sentences * width, width)[:, None]
        return (
            np.take_along_axis(total_SC, best_SM, axis=1),
            np.take_along_axis(token_RK.reshape(sentences, -1), best_SM, axis=1),
            first_row_S1 + best_SM // token_RK.shape[1],
        )

    def _finish(
        self, log_prob_SM: NDArray[np.float64], ends_SM: NDArray[np.bool_], parent_SM: NDArray[np.int64]
    ) -> None:
        beam_size, n_best = self._options.beam_size, self._options.n_best
        finishes = ends_SM[:, :beam_size] & np.isfinite(log_prob_SM[:, :beam_size])
        for row, rank in np.argwhere(finishes):
            found = self._finished[self._sentence_S[row]]
            tokens = tuple(self._history_RT[parent_SM[row, rank]].tolist())
            found.append(self._hypothesis(tokens, float(log_prob_SM[row, rank]), finished=True))
            found.sort(key=lambda hypothesis: -hypothesis.score)
            self._enough_S[row] = len(found) >= beam_size
            self._score_to_beat_S[row] = found[n_best - 1].score if len(found) >= n_best else -np.inf

    def _is_done(self) -> NDArray[np.bool_]:
        """Tell which sentences are done before their maximum length; see the module's docstring."""
        if self._options.beam_size == 1:
            return self._enough_S | ~np.isfinite(self._log_prob_SW[:, 0])
        best_S, penalty = self._log_prob_SW[:, 0], self._options.length_penalty
        at_shortest_S = best_S / float(self._length + 1) ** penalty
        at_longest_S = best_S / self._max_length_S.astype(np.float64) ** penalty
        hopeless_S = np.maximum(at_shortest_S, at_longest_S) <= self._score_to_beat_S
        done_S: NDArray[np.bool_] = (self._enough_S & hopeless_S) | ~np.isfinite(best_S)
        return done_S

    def _cut_off(self, which: NDArray[np.int64], token_SW: NDArray[np.int64], parent_SW: NDArray[np.int64]) -> None:
        for row in which:
            for token, parent, log_prob in zip(token_SW[row], parent_SW[row], self._log_prob_SW[row], strict=True):
                if np.isfinite(log_prob):
                    tokens = (*self._history_RT[parent].tolist(), int(token))
                    hypothesis = self._hypothesis(tokens, float(log_prob), finished=False)
                    self._cut[self._sentence_S[row]].append(hypothesis)

    def _keep_sentences(
        self, stays_S: NDArray[np.bool_], token_SW: NDArray[np.int64], parent_SW: NDArray[np.int64]
    ) -> None:
        self.tokens_R = token_SW[stays_S].reshape(-1)
        self.parents_R = parent_SW[stays_S].reshape(-1)
        self._history_RT = np.concatenate((self._history_RT[self.parents_R], self.tokens_R[:, None]), axis=1)
        if not stays_S.all():
            self._log_prob_SW = self._log_prob_SW[stays_S]
            self._sentence_S, self._max_length_S = self._sentence_S[stays_S], self._max_length_S[stays_S]
            self._enough_S, self._score_to_beat_S = self._enough_S[stays_S], self._score_to_beat_S[stays_S]

    def _hypothesis(self, tokens: tuple[int, ...], log_probability: float, *, finished: bool) -> RawHypothesis:
        score = log_probability / float(len(tokens) + finished) ** self._options.length_penalty
        return RawHypothesis(tokens=tokens, log_probability=log_probability, score=score, finished=finished)
