"""What changes a model's distribution: repetition penalty, no repeated n-grams, minimum length.

Shape suffixes: S sentences, W rows of each, R = S * W rows, V vocabulary, T tokens so far, N rows in question, I places
where an n-gram may begin.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from ferryman_service.domain.tokens import BOS, EOS, PAD

_FIRST_STEPS: Final = 64
_LEAST_PENALTY: Final = 1e-30
"""What a smaller penalty would divide might be infinite."""


class Histories:
    """The tokens of each row so far, filled with PAD. Kept only while a sentence of the batch asks for it: what a
    sentence that does not ask has here, may be anything."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._token_SWT: NDArray[np.int64] | None = None

    def admit(self, sentences: int, *, wanted: bool) -> None:
        """Make the sentences of the batch so many; new ones have no tokens yet."""
        if self._token_SWT is None:
            if wanted:
                self._token_SWT = np.full((sentences, self._width, _FIRST_STEPS), PAD)
            return
        _, width, steps = self._token_SWT.shape
        new_SWT = np.full((sentences - len(self._token_SWT), width, steps), PAD)
        self._token_SWT = np.concatenate((self._token_SWT, new_SWT))

    def keep(self, kept_S: NDArray[np.int64], *, wanted: bool) -> None:
        """Let all other sentences leave."""
        self._token_SWT = self._token_SWT[kept_S] if self._token_SWT is not None and wanted else None

    def append(self, parent_SW: NDArray[np.int64], token_SW: NDArray[np.int64], length_S: NDArray[np.int64]) -> None:
        """Let each row continue its parent with a token; `length_S` counts those before it."""
        if self._token_SWT is None:
            return
        number_S = np.arange(len(token_SW))
        if length_S.max() >= self._token_SWT.shape[2]:
            self._token_SWT = np.concatenate((self._token_SWT, np.full_like(self._token_SWT, PAD)), axis=2)
        self._token_SWT = self._token_SWT[number_S[:, None], parent_SW]
        self._token_SWT[number_S, :, length_S] = token_SW

    def until(self, length: int) -> NDArray[np.int64]:
        """Return token_SWT, the first `length` tokens of each row."""
        assert self._token_SWT is not None, "nobody asked for histories"
        return self._token_SWT[:, :, :length]


def log_softmax(logits_SWV: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return log-probabilities in an array of their own."""
    shifted_SWV: NDArray[np.float32] = logits_SWV - logits_SWV.max(axis=2, keepdims=True)
    shifted_SWV -= np.log(np.exp(shifted_SWV).sum(axis=2, keepdims=True))
    return shifted_SWV


def penalise_repetition(
    logits_SWV: NDArray[np.float32], token_SWT: NDArray[np.int64], penalty_S: NDArray[np.float64]
) -> NDArray[np.float32]:
    """Return logits with the positive ones of tokens that the row holds divided, the negative ones multiplied by the
    penalty (Keskar et al., 2019, section 4.1; both lower them)."""
    held_SWT = np.take_along_axis(logits_SWV, token_SWT, axis=2)
    least_S = np.maximum(penalty_S, _LEAST_PENALTY)
    penalty_SWT = np.where(token_SWT == PAD, 1.0, least_S[:, None, None]).astype(np.float32)
    penalised_SWV = logits_SWV.copy()
    changed_SWT = np.where(held_SWT > 0, held_SWT / penalty_SWT, held_SWT * penalty_SWT)
    np.put_along_axis(penalised_SWV, token_SWT, changed_SWT, axis=2)
    return penalised_SWV


def forbid_specials(log_probs_SWV: NDArray[np.float32], no_end_S: NDArray[np.bool_]) -> None:
    """Forbid PAD and BOS, and the end symbol in the sentences of `no_end_S`, in place."""
    log_probs_SWV[:, :, [PAD, BOS]] = -np.inf
    log_probs_SWV[no_end_S, :, EOS] = -np.inf


def forbid_ngrams(
    log_probs_SWV: NDArray[np.float32],
    token_SWT: NDArray[np.int64],
    length_S: NDArray[np.int64],
    ngram_size_S: NDArray[np.int64],
) -> None:
    """Forbid the tokens that would complete an n-gram which the row holds already, in place. A size of 0 allows all."""
    width, vocabulary = log_probs_SWV.shape[1:]
    log_probs_RV = log_probs_SWV.reshape(-1, vocabulary)
    for size in np.unique(ngram_size_S[(ngram_size_S > 0) & (length_S >= ngram_size_S)]).tolist():
        sentence_N = np.flatnonzero((ngram_size_S == size) & (length_S >= size))
        row_N = (sentence_N[:, None] * width + np.arange(width)).ravel()
        token_NT = token_SWT[sentence_N].reshape(len(row_N), -1)
        length_N1 = np.repeat(length_S[sentence_N], width)[:, None]
        first_I = np.arange(token_NT.shape[1] - size + 1)
        holds_NI = first_I + size <= length_N1
        for offset in range(size - 1):
            last_N1 = np.take_along_axis(token_NT, length_N1 - (size - 1) + offset, axis=1)
            holds_NI &= token_NT[:, first_I + offset] == last_N1
        row, place = np.nonzero(holds_NI)
        log_probs_RV[row_N[row], token_NT[row, place + size - 1]] = -np.inf
