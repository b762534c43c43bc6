"""Translating: options, results, timings, and the caller's right to stop it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ferryman_service.domain.errors import Cancelled, DeadlineExceeded, Violation


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """How to search. `max_length` None: two times the source's subwords plus 10, at most the model's limit."""

    beam_size: int = 5
    n_best: int = 1
    length_penalty: float = 1.0
    max_length: int | None = None


def option_violations(options: SearchOptions, path: str = "options") -> Iterator[Violation]:
    """Yield what is wrong with the options."""
    legal: Mapping[str, tuple[float, float]] = {
        "beam_size": (1, 32),
        "n_best": (1, 32),
        "length_penalty": (-5, 5),
        "max_length": (1, 4096),
    }
    for name, (low, high) in legal.items():
        value: Any = getattr(options, name)
        if value is not None and not low <= value <= high:
            text = f"is {value:g}, must be from {low:g} to {high:g}"
            yield Violation(field=f"{path}.{name}", description=text, reason="OUT_OF_RANGE")
    if 1 <= options.beam_size < options.n_best:
        text = f"is {options.n_best}, must not be above beam_size, which is {options.beam_size}"
        yield Violation(field=f"{path}.n_best", description=text, reason="CONFLICT")


@dataclass(frozen=True, kw_only=True)
class Hypothesis:
    """One translation of a sentence. `score` is log_probability / target_tokens ** length_penalty.

    `tokens` are its subword ids, without start and end symbols.
    """

    text: str
    score: float
    log_probability: float
    target_tokens: int
    finished: bool
    tokens: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Translation:
    """The hypotheses for one sentence, best first."""

    hypotheses: Sequence[Hypothesis]
    source_tokens: int


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Where the time of a request went, nanoseconds."""

    queue_ns: int
    text_ns: int
    encode_ns: int
    decode_ns: int


class CancelToken:
    """Tells work in another thread that nobody waits for it any more. Safe to use from every thread."""

    def __init__(self, deadline_s: float | None = None) -> None:
        """Store the deadline, on the clock of time.monotonic()."""
        self._deadline_s = deadline_s
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Ask the work to stop."""
        self._cancelled.set()

    def check(self) -> None:
        """Raise Cancelled or DeadlineExceeded if the work is no longer wanted."""
        if self._cancelled.is_set():
            raise Cancelled("the caller cancelled the request")
        if self._deadline_s is not None and time.monotonic() >= self._deadline_s:
            raise DeadlineExceeded("the caller's deadline passed before the work was done")
