"""How one sentence is searched, and what is found for it."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Final

from ferryman_service.domain.tokens import BOS, EOS, PAD
from ferryman_service.domain.translation import EarlyStopping, SearchOptions

MIN_LENGTH: Final = 1
OPTIMAL: Final = 2
TOKEN_SCORES: Final = 4
ALIGNMENT: Final = 8
REPETITION_PENALTY: Final = 16
NO_REPEAT_NGRAM: Final = 32
PREFIX: Final = 64
SAMPLING: Final = 128
"""What a search uses beyond the plain beam, as bits; what no sentence of a batch uses costs its steps nothing."""

_NEED_LOGITS: Final = REPETITION_PENALTY | NO_REPEAT_NGRAM | PREFIX | SAMPLING


@dataclass(frozen=True, kw_only=True)
class SentenceSearch:
    """How to search for one sentence. Lengths are in subwords: `max_length` (at least 1) counts the end symbol,
    `min_length` does not; where both cannot hold, the maximum wins. `prefix`: the subwords that the translation must
    begin with, no special symbols but UNK, at most max_length. `seed` (64 bits) is that of the sampling, if there is
    one: the options' seed does not count here."""

    options: SearchOptions
    max_length: int
    min_length: int = 0
    prefix: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        assert self.max_length >= 1, f"max_length {self.max_length} is below 1"
        assert 1 <= self.options.n_best <= self.options.rows, f"n_best {self.options.n_best} must be 1 to beam_size"
        assert len(self.prefix) <= self.max_length, "the prefix is longer than max_length"
        assert not {PAD, BOS, EOS} & set(self.prefix), "the prefix holds special symbols"
        assert 0 <= self.seed < 2**64, f"seed {self.seed} does not fit into 64 bits"

    @functools.cached_property
    def uses(self) -> int:
        """What this search uses, as bits."""
        options = self.options
        beam = options.sampling is None and options.beam_size > 1
        return (
            MIN_LENGTH * (self.min_length > 0)
            | OPTIMAL * (beam and options.early_stopping is EarlyStopping.OPTIMAL)
            | TOKEN_SCORES * options.return_token_scores
            | ALIGNMENT * options.return_alignment
            | REPETITION_PENALTY * (options.repetition_penalty != 1.0)
            | NO_REPEAT_NGRAM * (options.no_repeat_ngram_size > 0)
            | PREFIX * bool(self.prefix)
            | SAMPLING * (options.sampling is not None)
        )

    @property
    def needed(self) -> int:
        """How many hypotheses must have finished before the search may end: beam_size * beam_patience, rounded up, but
        one for greedy search. All samples must end."""
        options = self.options
        if options.sampling is not None:
            return options.rows
        return 1 if options.beam_size == 1 else math.ceil(options.beam_size * options.beam_patience - 1e-9)


@dataclass(frozen=True, kw_only=True)
class RawHypothesis:
    """A found target sentence: tokens without start and end symbols; `finished` if the end symbol was reached.

    `log_probability` is the model's own (natural logarithm); `score` is what hypotheses are ranked by, see
    search/beam.py. `token_log_probs` (the model's; their sum is log_probability) and `alignment` (for each token, the
    source position that it attended to most) are as long as `length`, or empty if the options do not ask for them.
    """

    tokens: tuple[int, ...]
    log_probability: float
    score: float
    finished: bool
    token_log_probs: tuple[float, ...] = ()
    alignment: tuple[int, ...] = ()

    @property
    def length(self) -> int:
        """Subwords, the end symbol included if it was reached."""
        return len(self.tokens) + self.finished


def needs_logits(search: SentenceSearch) -> bool:
    """Tell whether the search changes or looks up probabilities of the whole vocabulary: such sentences need a batch
    of their own, whose steps return logits."""
    return bool(search.uses & _NEED_LOGITS)
