"""What search needs from a model.

Shape suffixes: S sentences of the running batch, W rows (hypotheses being extended) of each, K candidates per row, V
vocabulary, L source positions.
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

    log_probs_SWK: NDArray[np.float32]
    tokens_SWK: NDArray[np.int64]


class RunningBatch(Protocol):
    """Encoded sentences and the caches of the rows that translate them; sentences leave and join between steps.

    Every sentence has `width` rows from the start. Used by one thread at a time. What a step returns may be overwritten
    by the next one.
    """

    @property
    def width(self) -> int:
        """W, at least 1."""
        ...

    @property
    def sentences(self) -> int:
        """S: how many sentences are in the batch."""
        ...

    @property
    def size_bytes(self) -> int:
        """How much memory the caches take; may be asked by another thread than the one that uses the batch."""
        ...

    def admit(self, sources: Sequence[Sequence[int]]) -> None:
        """Encode sentences (subword ids, end symbol included, none empty) and put them behind those in the batch."""
        ...

    def keep(self, kept_S: NDArray[np.int64]) -> None:
        """Let all sentences leave but these: numbers of present sentences, rising. Sentence i becomes kept_S[i]'s."""
        ...

    def step(self, tokens_SW: NDArray[np.int64], parents_SW: NDArray[np.int64], k: int) -> Candidates:
        """Feed one token to each row and return its `k` best continuations, or all of a smaller vocabulary.

        Row w of sentence s continues row parents_SW[s, w] of the same sentence's step before: a row that is nobody's
        parent is dropped, and a parent may be named more often. In a sentence's first step all its rows are equal.
        """
        ...

    def step_logits(self, tokens_SW: NDArray[np.int64], parents_SW: NDArray[np.int64]) -> NDArray[np.float32]:
        """As `step`, but return the raw logits_SWV."""
        ...

    def attention(self) -> NDArray[np.float32]:
        """Return what each row of the last step paid attention to: weights over the source positions (0 at padding),
        mean over the heads of the last decoder layer. Only if the batch was made with `attention=True`."""
        ...


class Decoder(Protocol):
    """A model. Safe to call from several threads at once; each batch belongs to one."""

    def batch(self, width: int, *, attention: bool = False) -> RunningBatch:
        """Return an empty batch with `width` rows per sentence."""
        ...
