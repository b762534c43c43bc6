"""The measurements inside an engine's process, the same for ours and for CTranslate2: both are a `TokenEngine`.

Sentences come and go as subword ids; turning them into an engine's own form is not timed, and neither is subword
splitting. This file needs only the standard library.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from bench.shared.process import memory_mib

_MS_PER_NS = 1e-6


@dataclass(frozen=True, kw_only=True)
class TokenSearch:
    """How to translate: subwords at most, end symbol included; `forced`: exactly so many, without an end symbol.
    `max_batch_size` is CTranslate2's, sentences."""

    beam_size: int
    max_length: int
    forced: bool = False
    max_batch_size: int = 0


@dataclass(frozen=True, kw_only=True)
class Found:
    """The best translation: its subwords without the end symbol, and its score (log-probability over length)."""

    tokens: Sequence[int]
    score: float


class TokenEngine(Protocol):
    """A loaded model that translates subwords. Used by one thread."""

    def prepare(self, sentence: Sequence[int]) -> Any:  # noqa: ANN401
        """Return a sentence, end symbol included, in the form that `translate` takes."""
        ...

    def translate(self, prepared: Sequence[Any], search: TokenSearch) -> Any:  # noqa: ANN401
        """Translate: this is timed."""
        ...

    def read(self, result: Any) -> list[Found]:  # noqa: ANN401
        """Return what `translate` has found."""
        ...


class Commands:
    """The commands that a serving process answers."""

    def __init__(self, engine: TokenEngine) -> None:
        self._engine = engine
        self._prepared: list[Any] = []

    def handlers(self) -> Mapping[str, Callable[..., Any]]:
        """Return the commands by name."""
        return {
            "sentences": self.sentences,
            "latency": self.latency,
            "throughput": self.throughput,
            "translate": self.translate,
            "memory": memory_mib,
        }

    def sentences(self, ids: Sequence[Sequence[int]]) -> int:
        """Take the sentences that the other commands are about."""
        self._prepared = [self._engine.prepare(sentence) for sentence in ids]
        return len(self._prepared)

    def latency(self, first: int, count: int, **search: Any) -> list[float]:  # noqa: ANN401
        """Translate some of the sentences one after the other; return the milliseconds of each."""
        options = TokenSearch(**search)
        taken_ms = []
        for sentence in self._prepared[first : first + count]:
            begin_ns = time.perf_counter_ns()
            self._engine.translate([sentence], options)
            taken_ms.append((time.perf_counter_ns() - begin_ns) * _MS_PER_NS)
        return taken_ms

    def throughput(self, **search: Any) -> dict[str, float]:  # noqa: ANN401
        """Translate all sentences at once; return the seconds, and the subwords of the translations."""
        begin_s = time.perf_counter()
        result = self._engine.translate(self._prepared, TokenSearch(**search))
        taken_s = time.perf_counter() - begin_s
        return {"seconds": taken_s, "tokens": sum(len(found.tokens) for found in self._engine.read(result))}

    def translate(self, **search: Any) -> list[dict[str, Any]]:  # noqa: ANN401
        """Translate all sentences; return what was found."""
        found = self._engine.read(self._engine.translate(self._prepared, TokenSearch(**search)))
        return [{"tokens": list(item.tokens), "score": item.score} for item in found]
