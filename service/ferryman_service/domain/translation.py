"""Translating: options, results, timings, and the caller's right to stop it."""

from __future__ import annotations

import enum
import math
import sys
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ferryman_service.domain.errors import Cancelled, DeadlineExceeded, Violation

MAX_TRANSLATION_TOKENS: Final = 4096
"""The largest max_length that the contract allows, subwords with the end symbol."""


class ComputeType(enum.StrEnum):
    """The arithmetic of a model's matrix products. INT8: weights and activations of 8 bits, sums of 32. FP16, on a GPU:
    all is of 16 bits but the statistics of layer norms and log-probabilities."""

    FP32 = "fp32"
    INT8 = "int8"
    FP16 = "fp16"


class EarlyStopping(enum.StrEnum):
    """When a beam search has found enough.

    FIRST: beam_size * beam_patience hypotheses have finished. OPTIMAL: and no row can still become one of the n_best.
    """

    FIRST = "first"
    OPTIMAL = "optimal"


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Random sampling: logits / temperature, then the top_k most probable (0: all), then the smallest set of them whose
    probabilities reach top_p. `seed` None: drawn at random by whoever takes the request."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """How to search; the contract's TranslateOptions says what each option means.

    `max_length` None: two times the source's subwords plus 10. It is at most the limit of the model, or the operator's.
    With `sampling` there are n_best independent samples and beam_size does not count.
    """

    beam_size: int = 5
    n_best: int = 1
    length_penalty: float = 1.0
    max_length: int | None = None
    max_length_ratio: float | None = None
    min_length: int = 0
    beam_patience: float = 1.0
    early_stopping: EarlyStopping = EarlyStopping.FIRST
    sampling: Sampling | None = None
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    return_token_scores: bool = False
    return_alignment: bool = False

    @property
    def rows(self) -> int:
        """Rows that a sentence takes in the running batch."""
        return self.beam_size if self.sampling is None else self.n_best


def option_violations(options: SearchOptions, path: str = "options") -> Iterator[Violation]:
    """Yield what is wrong with the options. Ranges that begin above 0 exclude it."""
    legal: Mapping[str, tuple[float, float]] = {
        "beam_size": (1, 32),
        "n_best": (1, 32),
        "length_penalty": (-5, 5),
        "max_length": (1, MAX_TRANSLATION_TOKENS),
        "max_length_ratio": (_ABOVE_ZERO, 100),
        "min_length": (0, 4095),
        "beam_patience": (1, 10),
        "repetition_penalty": (_ABOVE_ZERO, 10),
        "no_repeat_ngram_size": (0, 32),
    }
    yield from _out_of_range(options, legal, path)
    if options.sampling is not None:
        sampling = {"temperature": (_ABOVE_ZERO, 100), "top_k": (0, math.inf), "top_p": (_ABOVE_ZERO, 1)}
        yield from _out_of_range(options.sampling, sampling, f"{path}.sampling")
    elif 1 <= options.beam_size < options.n_best:
        text = f"is {options.n_best}, must not be above beam_size, which is {options.beam_size}"
        yield Violation(field=f"{path}.n_best", description=text, reason="CONFLICT")
    if options.max_length is not None and 1 <= options.max_length <= options.min_length:
        text = f"is {options.min_length}, must be below max_length, which is {options.max_length}"
        yield Violation(field=f"{path}.min_length", description=text, reason="CONFLICT")


# Not the smallest number above zero: a process that flushes denormal numbers would take that one for zero.
_ABOVE_ZERO: Final = sys.float_info.min


def _out_of_range(options: object, legal: Mapping[str, tuple[float, float]], path: str) -> Iterator[Violation]:
    for name, (low, high) in legal.items():
        value: Any = getattr(options, name)
        if value is not None and not low <= value <= high:
            least = "above 0" if low == _ABOVE_ZERO else f"from {low:g}"
            most = "" if high == math.inf else f" to {high:g}"
            yield Violation(
                field=f"{path}.{name}", description=f"is {value:g}, must be {least}{most}", reason="OUT_OF_RANGE"
            )


@dataclass(frozen=True, kw_only=True)
class Hypothesis:
    """One translation of a sentence. `score` is log_probability / target_tokens ** length_penalty.

    `tokens` are its subword ids, without start and end symbols. `pieces` (end symbol included if it was reached),
    `token_log_probabilities` and `alignment` are as long as target_tokens, or empty if nobody asked for them.
    """

    text: str
    score: float
    log_probability: float
    target_tokens: int
    finished: bool
    tokens: tuple[int, ...] = ()
    pieces: Sequence[str] = ()
    token_log_probabilities: Sequence[float] = ()
    alignment: Sequence[int] = ()


@dataclass(frozen=True, kw_only=True)
class Translation:
    """The hypotheses for one sentence, best first. `source_pieces`: with the end symbol; empty if nobody asked."""

    hypotheses: Sequence[Hypothesis]
    source_tokens: int
    source_pieces: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Where the time of a sentence or a request went, nanoseconds; of a request, of the sentence that took longest.

    `row_steps` are the rows of the running batch, added up over the `steps` that this work took part in. `end_ns` is
    when it was done, on the clock of time.perf_counter_ns(); 0 where that is not known.
    """

    queue_ns: int = 0
    text_ns: int = 0
    encode_ns: int = 0
    decode_ns: int = 0
    steps: int = 0
    row_steps: int = 0
    end_ns: int = 0


def slowest(timings: Sequence[Timings]) -> Timings:
    """Return the timings of a request: of each stage, those of the sentence that took longest; the text of all."""
    if not timings:
        return Timings()
    most = max(timings, key=lambda each: each.steps)
    return Timings(
        queue_ns=max(each.queue_ns for each in timings),
        text_ns=sum(each.text_ns for each in timings),
        encode_ns=max(each.encode_ns for each in timings),
        decode_ns=max(each.decode_ns for each in timings),
        steps=most.steps,
        row_steps=most.row_steps,
        end_ns=max(each.end_ns for each in timings),
    )


class CancelToken:
    """Tells work in another thread that nobody waits for it any more. Safe to use from every thread."""

    def __init__(self, deadline_s: float | None = None) -> None:
        """Store the deadline, on the clock of time.monotonic()."""
        self._deadline_s = deadline_s
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Ask the work to stop."""
        self._cancelled.set()

    def is_wanted(self) -> bool:
        """Tell whether anybody still waits for the work."""
        return not (self._cancelled.is_set() or (self._deadline_s is not None and time.monotonic() >= self._deadline_s))

    def remaining_s(self) -> float | None:
        """Return the seconds until the deadline, none or fewer if it has passed; None without one."""
        return None if self._deadline_s is None else self._deadline_s - time.monotonic()

    def check(self) -> None:
        """Raise Cancelled or DeadlineExceeded if the work is no longer wanted."""
        if self._cancelled.is_set():
            raise Cancelled("the caller cancelled the request")
        if self._deadline_s is not None and time.monotonic() >= self._deadline_s:
            raise DeadlineExceeded("the caller's deadline passed before the work was done")


@dataclass(frozen=True, kw_only=True)
class PreparedSentence:
    """A sentence as a model takes it: subword ids with the end symbol (none for an empty sentence), the ids that its
    translation must begin with, and the bounds of the translation's length in subwords, end symbol included."""

    source: tuple[int, ...]
    prefix: tuple[int, ...] = ()
    min_length: int = 0
    max_length: int = 1
    text_ns: int = 0

    @property
    def work_tokens(self) -> int:
        """About how many subwords a row of it takes: those of the source, or those that the translation must have, if
        that is more; none for an empty sentence."""
        return max(len(self.source), self.min_length, len(self.prefix)) if self.source else 0

    @property
    def booked_tokens(self) -> int:
        """What a row of it is booked with before its length is known, subwords; none for an empty sentence."""
        return max(self.work_tokens, tokens_to_book(self.max_length)) if self.source else 0


def tokens_to_book(max_length: int) -> int:
    """Return what a row of at most `max_length` subwords is booked with: about half of them.

    That of n subwords whose maximum length is the default, 2 n + 10, is booked with n; a longer maximum in proportion.
    """
    return max(1, -(-(max_length - 10) // 2))


@dataclass(frozen=True, kw_only=True)
class SentenceResult:
    """What became of a sentence: a translation, or why there is none (Cancelled, DeadlineExceeded, or a bug)."""

    translation: Translation | None
    error: Exception | None
    timings: Timings


class FairShare:
    """One caller's share of the engine. Waiting sentences are taken in the order of their virtual start times
    (start-time fair queueing; Goyal et al., 1996): a caller's sentence starts where its one before ended, each of
    `cost` tokens lasting cost / weight. So callers advance by weight however much each has queued, and none waits for
    ever.

    Peers, which may have many callers each, advance alike in the same way; callers of one peer share what it gets.

    `booked` belongs to the engine, and so does `start_of`.
    """

    def __init__(self, weight: float = 1.0, peer: str = "") -> None:
        """Store the weight: a caller of weight 4 gets four times the tokens of one of weight 1, while both wait.
        `peer` tells where the caller is; callers with the same peer share its part."""
        assert weight > 0, "a share's weight must be positive"
        self.weight = weight
        self.peer = peer
        self._finish: dict[Hashable, float] = {}
        self.booked = 0
        """Rows times maximum lengths of the caller's sentences that wait or run."""

    def start_of(self, cost: float, now: float, clock: Hashable = None) -> float:
        """Return the virtual start time of the caller's next sentence and book its cost; `now` is the virtual time of
        the `clock`, which knows nothing of other clocks' times."""
        start = max(now, self._finish.get(clock, 0.0))
        self._finish[clock] = start + cost / self.weight
        return start


@dataclass(frozen=True, kw_only=True)
class SentenceWork:
    """A sentence to translate, for whom, and whom to tell. `done` is called exactly once, from a thread of the engine
    or from the one that submits; it must be quick and must not raise. `seed` is that of the sampling, if there is
    one."""

    sentence: PreparedSentence
    options: SearchOptions
    token: CancelToken
    share: FairShare
    done: Callable[[SentenceResult], None]
    seed: int = 0
