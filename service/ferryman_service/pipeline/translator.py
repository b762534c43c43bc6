"""Sentences in, translations out: normalise, split into subwords, decode in micro-batches, join again.

Shape suffix: S sentences of a micro-batch.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from ferryman_service.domain.errors import InvalidSentence, Violation
from ferryman_service.domain.tokens import EOS
from ferryman_service.domain.translation import CancelToken, Hypothesis, SearchOptions, Timings, Translation
from ferryman_service.search.beam import BeamOptions, RawHypothesis, search
from ferryman_service.search.decoder import Decoder
from ferryman_service.text.normalise import has_control_characters, normalise
from ferryman_service.text.subwords import Subwords

_EMPTY: Final = Hypothesis(text="", score=0.0, log_probability=0.0, target_tokens=0, finished=True)


@dataclass(frozen=True, kw_only=True)
class MicroBatchLimit:
    """Bounds the memory of a micro-batch: rows (sentences times beam) times the positions each may come to hold, source
    and target. One sentence is always let through."""

    max_positions: int = 8192

    def __post_init__(self) -> None:
        assert self.max_positions > 0, "max_positions must be positive"


@dataclass(frozen=True)
class _Source:
    """A sentence to decode: its place in the request, subword ids with the end symbol, longest translation."""

    index: int
    tokens: Sequence[int]
    max_length: int

    @property
    def positions(self) -> int:
        return len(self.tokens) + self.max_length


class TextTranslator:
    """A Translator over any Decoder. Safe to call from several threads at once, as the decoder is."""

    def __init__(self, subwords: Subwords, decoder: Decoder, max_sentence_tokens: int, limit: MicroBatchLimit) -> None:
        self._subwords = subwords
        self._decoder = decoder
        self._max_sentence_tokens = max_sentence_tokens
        self._limit = limit

    def max_sentence_tokens(self) -> int:
        """Return the longest source sentence, in subwords with the end symbol."""
        return self._max_sentence_tokens

    def translate(
        self, sentences: Sequence[str], options: SearchOptions, token: CancelToken
    ) -> tuple[Sequence[Translation], Timings]:
        """Translate, in order. Raises InvalidSentence with every violation, Cancelled, DeadlineExceeded."""
        clock = _Clock()
        sources = self._sources(sentences, options)
        clock.lap("text")
        found: list[list[RawHypothesis]] = [[] for _ in sentences]
        for batch in _micro_batches(sources, options.beam_size, self._limit.max_positions):
            token.check()
            session = self._decoder.encode([source.tokens for source in batch])
            clock.lap("encode")
            max_lengths_S = np.array([source.max_length for source in batch], dtype=np.int64)
            results = search(session, _beam_options(options), max_lengths_S, token.check)
            for source, hypotheses in zip(batch, results, strict=True):
                found[source.index] = hypotheses
            clock.lap("decode")
        source_tokens = dict.fromkeys(range(len(sentences)), 0) | {s.index: len(s.tokens) for s in sources}
        translations = [self._translation(hypotheses, source_tokens[index]) for index, hypotheses in enumerate(found)]
        clock.lap("text")
        return translations, clock.timings()

    def _sources(self, sentences: Sequence[str], options: SearchOptions) -> list[_Source]:
        normalised = [normalise(sentence) for sentence in sentences]
        pieces = self._subwords.encode(normalised)
        violations = [
            *(_control_character(i) for i, sentence in enumerate(sentences) if has_control_characters(sentence)),
            *(self._too_long(i, len(ids) + 1) for i, ids in enumerate(pieces) if len(ids) >= self._max_sentence_tokens),
        ]
        if violations:
            raise InvalidSentence(violations)
        return [
            _Source(index, (*ids, EOS), self._max_length(len(ids) + 1, options))
            for index, (text, ids) in enumerate(zip(normalised, pieces, strict=True))
            if text
        ]

    def _max_length(self, source_tokens: int, options: SearchOptions) -> int:
        if options.max_length is not None:
            return options.max_length
        return min(2 * source_tokens + 10, self._max_sentence_tokens)

    def _too_long(self, index: int, source_tokens: int) -> Violation:
        return Violation(
            field=f"sentences[{index}]",
            description=f"has {source_tokens} subwords with the end symbol, the model takes at most "
            f"{self._max_sentence_tokens}: split the sentence",
            reason="SENTENCE_TOO_LONG",
        )

    def _translation(self, hypotheses: Sequence[RawHypothesis], source_tokens: int) -> Translation:
        if source_tokens == 0:
            return Translation(hypotheses=[_EMPTY], source_tokens=0)
        return Translation(hypotheses=[self._joined(raw) for raw in hypotheses], source_tokens=source_tokens)

    def _joined(self, raw: RawHypothesis) -> Hypothesis:
        return Hypothesis(
            text=self._subwords.decode(raw.tokens),
            score=raw.score,
            log_probability=raw.log_probability,
            target_tokens=raw.length,
            finished=raw.finished,
            tokens=raw.tokens,
        )


class _Clock:
    """Adds up where the time goes."""

    def __init__(self) -> None:
        self._last_ns = time.perf_counter_ns()
        self._spent_ns = {"text": 0, "encode": 0, "decode": 0}

    def lap(self, part: str) -> None:
        """Book the time since the lap before."""
        now_ns = time.perf_counter_ns()
        self._spent_ns[part] += now_ns - self._last_ns
        self._last_ns = now_ns

    def timings(self) -> Timings:
        """Return the sums; nothing waits in a queue here."""
        spent = self._spent_ns
        return Timings(queue_ns=0, text_ns=spent["text"], encode_ns=spent["encode"], decode_ns=spent["decode"])


def _beam_options(options: SearchOptions) -> BeamOptions:
    return BeamOptions(beam_size=options.beam_size, n_best=options.n_best, length_penalty=options.length_penalty)


def _micro_batches(sources: Sequence[_Source], beam_size: int, max_positions: int) -> Iterator[list[_Source]]:
    """Yield the sources in batches of similar length, longest first, each within the limit."""
    batch: list[_Source] = []
    for source in sorted(sources, key=lambda source: -source.positions):
        if batch and (len(batch) + 1) * beam_size * batch[0].positions > max_positions:
            yield batch
            batch = []
        batch.append(source)
    if batch:
        yield batch


def _control_character(index: int) -> Violation:
    return Violation(
        field=f"sentences[{index}]",
        description="holds control characters other than tab, line feed and carriage return: remove them",
        reason="CONTROL_CHARACTER",
    )
