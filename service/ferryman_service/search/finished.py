"""The finished hypotheses of each sentence: as many as it has room for, the n_best among them.

Shape suffixes: S sentences, F places of each, W rows of each, N hypotheses or sentences in question.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

FINISHED: Final = np.dtype([("score", "f8"), ("log_prob", "f8"), ("steps", "i4"), ("row", "i4")])
"""A hypothesis that was row `row` after so many steps, and ended in the next; with the score -inf, none."""

_OPAQUE: Final = np.dtype(("V", FINISHED.itemsize))
"""As bytes hypotheses are copied one by one, not field by field, which takes longer."""

_PLACES_PER_ROW: Final = 3


def places(width: int) -> int:
    """Return F: what EarlyStopping.FIRST needs without beam_patience, at most 2 * W - 1, and a step's more."""
    return _PLACES_PER_ROW * width


def add_finished(
    finished_SF: NDArray[np.void], stored_S: NDArray[np.int64], sentence_N: NDArray[np.int64], new_N: NDArray[np.void]
) -> NDArray[np.int64]:
    """Put new hypotheses behind those of their sentences, whose numbers do not fall; at most W are of one sentence.
    `stored_S` counts a sentence's hypotheses. Where W more might not fit the next time, the best W stay, of equal ones
    the older. Return how many are new in each sentence."""
    new_S = np.bincount(sentence_N, minlength=len(stored_S))
    nth_N = np.arange(len(sentence_N)) - np.searchsorted(sentence_N, sentence_N)
    place_N = stored_S[sentence_N] + nth_N
    finished_SF.view(_OPAQUE)[sentence_N, place_N] = new_N.view(_OPAQUE)
    stored_S += new_S
    width = finished_SF.shape[1] // _PLACES_PER_ROW
    too_many = finished_SF.shape[1] - width
    if np.maximum.reduce(stored_S) > too_many:
        _keep_best(finished_SF, stored_S, np.flatnonzero(stored_S > too_many), width)
    return new_S


def _keep_best(
    finished_SF: NDArray[np.void], stored_S: NDArray[np.int64], sentence_N: NDArray[np.int64], width: int
) -> None:
    best_NW = np.argsort(-finished_SF["score"][sentence_N], axis=1, kind="stable")[:, :width]
    kept: NDArray[Any] = finished_SF[sentence_N[:, None], best_NW]
    finished_SF["score"][sentence_N] = -np.inf
    finished_SF[sentence_N, :width] = kept
    stored_S[sentence_N] = width
