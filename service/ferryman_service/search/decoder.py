"""What search needs from a model.

Shape suffixes: S sentences, R rows (hypotheses that are being extended), K candidates per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Candidates:
    """The best continuations of each row, best first: natural log-probabilities over the whole vocabulary, and tokens.

    Equal log-probabilities are ordered by the smaller token.
    """

    log_probs_RK: NDArray[np.float32]
    tokens_RK: NDArray[np.int64]


class DecodingSession(Protocol):
    """Encoded sentences and the caches of the rows that translate them. Used by one thread."""

    def step(self, tokens_R: NDArray[np.int64], parents_R: NDArray[np.int64], k: int) -> Candidates:
        """Feed one token to each row and return its `k` best continuations, or all of a smaller vocabulary.

        `parents_R[i]` is the row of the previous step whose prefix row i continues (its cache and its sentence); in the
        first step row s is sentence s. Rows that nobody names as parent are dropped; a parent may be named more often.

        A sentence's rows stand together, the sentences keep their order, and in every step each sentence that is still
        there has equally many rows: so a sentence's encoded source serves all its rows without a copy.
        """
        ...


class Decoder(Protocol):
    """A model. Safe to call from several threads at once; each session belongs to one."""

    def encode(self, sources: Sequence[Sequence[int]]) -> DecodingSession:
        """Encode sentences (subword ids, end symbol included, none empty) and start decoding them."""
        ...
