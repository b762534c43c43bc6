"""What the rows of a running batch may be continued with.

Shape suffixes: S sentences, N some of them, W rows of each, K candidates per row, V vocabulary, T tokens so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ferryman_service.domain.tokens import BOS, EOS, PAD
from ferryman_service.search import constraints, sampling
from ferryman_service.search.decoder import Candidates
from ferryman_service.search.sentence import (
    MIN_LENGTH,
    NO_REPEAT_NGRAM,
    PREFIX,
    REPETITION_PENALTY,
    SAMPLING,
    SentenceSearch,
)
from ferryman_service.search.topk import k_best

_LOOKING_BACK: Final = REPETITION_PENALTY | NO_REPEAT_NGRAM
NOT_PAD_OR_BOS: Final = ~(PAD | BOS)
assert [token for token in range(4) if not token & NOT_PAD_OR_BOS] == [PAD, BOS]


@dataclass(frozen=True)
class Continuations:
    """For each row tokens, the log-probabilities to rank them by (-inf: it must not be chosen), and the model's own.
    The rows of the sentences `sampled_N` continue themselves, with their first candidate."""

    token_SWK: NDArray[np.int64]
    ranked_SWK: NDArray[np.float32]
    log_prob_SWK: NDArray[np.float32]
    sampled_N: NDArray[np.int64]

    def settle(
        self,
        sentence_N: NDArray[np.int64],
        token_NW: NDArray[np.int64],
        ranked_NW: NDArray[np.float32],
        log_prob_NW: NDArray[np.float32],
    ) -> None:
        """Leave each row of some sentences one candidate, its first."""
        self.ranked_SWK[sentence_N] = -np.inf
        self.token_SWK[sentence_N, :, 0] = token_NW
        self.ranked_SWK[sentence_N, :, 0] = ranked_NW
        self.log_prob_SWK[sentence_N, :, 0] = log_prob_NW


_NO_SENTENCE: Final = np.empty(0, dtype=np.int64)


def allowed(candidates: Candidates, state: NDArray[np.void], uses: int) -> Continuations:
    """Return the model's candidates; PAD, BOS and an end symbol that comes too early must not be chosen."""
    token_SWK, log_prob_SWK = candidates.tokens_SWK, candidates.log_probs_SWK.copy()
    forbidden_SWK = token_SWK & NOT_PAD_OR_BOS == 0
    if uses & MIN_LENGTH:
        forbidden_SWK |= (token_SWK == EOS) & _end_is_too_early(state)[:, None, None]
    log_prob_SWK[forbidden_SWK] = -np.inf
    return Continuations(token_SWK, log_prob_SWK, log_prob_SWK, _NO_SENTENCE)


class Changes:
    """What searches with logits change in the model's distribution: penalties, what must not come, forced prefixes, and
    the draw. Its sentences are numbered as those of the batch."""

    def __init__(self, width: int) -> None:
        self._histories = constraints.Histories(width)

    def admit(self, sentences: int, uses: int) -> None:
        """Make the sentences so many; `uses` are all of theirs."""
        self._histories.admit(sentences, wanted=bool(uses & _LOOKING_BACK))

    def keep(self, kept_S: NDArray[np.int64], uses: int) -> None:
        """Let all other sentences leave; `uses` are those of the ones that stay."""
        self._histories.keep(kept_S, wanted=bool(uses & _LOOKING_BACK))

    def append(self, parent_SW: NDArray[np.int64], token_SW: NDArray[np.int64], length_S: NDArray[np.int64]) -> None:
        """Take note of a step's choice; `length_S` are the lengths before it."""
        self._histories.append(parent_SW, token_SW, length_S)

    def continuations(
        self, logits_SWV: NDArray[np.float32], state: NDArray[np.void], searches: Sequence[SentenceSearch], uses: int
    ) -> Continuations:
        """Return the W + 1 best candidates of each row, or what a prefix or the draw leaves of them."""
        log_prob_SWV = constraints.log_softmax(logits_SWV)
        forced = _forced(log_prob_SWV, state, searches) if uses & PREFIX else None
        ranked_SWV = self._ranked(logits_SWV, log_prob_SWV, state, uses)
        token_SWK = _best_of_rows(ranked_SWV)
        found = Continuations(
            token_SWK,
            np.take_along_axis(ranked_SWV, token_SWK, axis=2),
            np.take_along_axis(log_prob_SWV, token_SWK, axis=2),
            np.flatnonzero(state["settings"]["uses"] & SAMPLING),
        )
        if uses & SAMPLING:
            found.settle(found.sampled_N, *_drawn(ranked_SWV, log_prob_SWV, state, found.sampled_N))
        if forced is not None:
            sentence_N, token_NW, log_prob_NW = forced
            found.settle(sentence_N, token_NW, log_prob_NW, log_prob_NW)
        return found

    def _ranked(
        self,
        logits_SWV: NDArray[np.float32],
        log_prob_SWV: NDArray[np.float32],
        state: NDArray[np.void],
        uses: int,
    ) -> NDArray[np.float32]:
        """Return what to rank by: an array of its own, or, where no penalty needs one, log_prob_SWV itself, changed."""
        ranked_SWV, settings_S, length_S = log_prob_SWV, state["settings"], state["length"]
        if uses & _LOOKING_BACK:
            history_SWT = self._histories.until(int(length_S.max()))
        if uses & REPETITION_PENALTY:
            penalty_S = settings_S["repetition_penalty"]
            ranked_SWV = constraints.log_softmax(constraints.penalise_repetition(logits_SWV, history_SWT, penalty_S))
        constraints.forbid_specials(ranked_SWV, _end_is_too_early(state))
        if uses & NO_REPEAT_NGRAM:
            constraints.forbid_ngrams(ranked_SWV, history_SWT, length_S, settings_S["ngram_size"])
        return ranked_SWV


def _end_is_too_early(state: NDArray[np.void]) -> NDArray[np.bool_]:
    """Tell in which sentences the end symbol must not come yet."""
    too_early_S: NDArray[np.bool_] = state["length"] < state["settings"]["min_length"]
    return too_early_S


def _best_of_rows(ranked_SWV: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return token_SWK, the best first. A row needs no more than the W that may go on and the end symbol."""
    sentences, width, vocabulary = ranked_SWV.shape
    k = min(width + 1, vocabulary)
    return k_best(ranked_SWV.reshape(-1, vocabulary), k).reshape(sentences, width, k)


def _forced(
    log_prob_SWV: NDArray[np.float32], state: NDArray[np.void], searches: Sequence[SentenceSearch]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Return the sentences that are still in their prefix, the next token of each row and its log-probability."""
    sentence_N = np.flatnonzero(state["length"] < state["settings"]["prefix_length"])
    lengths = state["length"][sentence_N].tolist()
    tokens = [searches[sentence].prefix[at] for sentence, at in zip(sentence_N.tolist(), lengths, strict=True)]
    width = log_prob_SWV.shape[1]
    token_NW = np.repeat(np.array(tokens, dtype=np.int64)[:, None], width, axis=1)
    return sentence_N, token_NW, log_prob_SWV[sentence_N[:, None], np.arange(width), token_NW]


def _drawn(
    ranked_SWV: NDArray[np.float32],
    log_prob_SWV: NDArray[np.float32],
    state: NDArray[np.void],
    sentence_N: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]:
    """Return for each row of some sentences a token drawn at random, with what it ranks by and its log-probability."""
    width = ranked_SWV.shape[1]
    settings_R: NDArray[Any] = np.repeat(state["settings"][sentence_N], width)
    row_R, length_R = np.tile(np.arange(width), len(sentence_N)), np.repeat(state["length"][sentence_N], width)
    token_R = sampling.draw(
        ranked_SWV[sentence_N].reshape(len(row_R), -1),
        sampling.Filters(settings_R["temperature"], settings_R["top_k"], settings_R["top_p"]),
        sampling.uniform(settings_R["seed"], row_R, length_R),
    )
    token_NW = token_R.reshape(-1, width)
    place = sentence_N[:, None], np.arange(width), token_NW
    return token_NW, ranked_SWV[place], log_prob_SWV[place]
