"""Which sentence each decoding row belongs to.

Shape suffixes: S sentences, R rows.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class SentenceRows:
    """Follows the rows of a DecodingSession from step to step."""

    def __init__(self, sentences: int) -> None:
        self._sentence_R = np.arange(sentences)
        self._sentences = sentences

    def follow(self, parents_R: NDArray[np.int64]) -> NDArray[np.int64] | None:
        """Take a step and return the sentences that stay, as positions among those before it; None if all stay."""
        sentence_R = self._sentence_R[parents_R]
        if np.array_equal(sentence_R, self._sentence_R):
            return None
        stays_S = sentence_R[np.flatnonzero(np.diff(sentence_R, prepend=-1))]
        rows_per_sentence = len(sentence_R) // len(stays_S)
        together = np.array_equal(sentence_R, np.repeat(stays_S, rows_per_sentence)) and (np.diff(stays_S) > 0).all()
        assert together, "rows of a sentence must stand together, equally many for each sentence, sentences in order"
        all_stay = len(stays_S) == self._sentences
        self._sentences = len(stays_S)
        self._sentence_R = np.repeat(np.arange(len(stays_S)), rows_per_sentence)
        return None if all_stay else stays_S
