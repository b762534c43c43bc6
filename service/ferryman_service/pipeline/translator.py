"""Sentences in, translations out, over any decoder, in one thread: what training validates and checks exports with."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ferryman_service.domain.translation import CancelToken, PreparedSentence, SearchOptions, Timings, Translation
from ferryman_service.pipeline.text import SentenceText
from ferryman_service.search.beam import search
from ferryman_service.search.decoder import Decoder
from ferryman_service.search.sentence import RawHypothesis, SentenceSearch
from ferryman_service.text.subwords import Subwords


@dataclass(frozen=True, kw_only=True)
class MicroBatchLimit:
    """Bounds the memory of a micro-batch: rows (sentences times beam) times the positions each may come to hold, source
    and target. One sentence is always let through."""

    max_positions: int = 8192

    def __post_init__(self) -> None:
        assert self.max_positions > 0, "max_positions must be positive"


class TextTranslator:
    """A Translator over any Decoder. Safe to call from several threads at once, as the decoder is."""

    def __init__(self, subwords: Subwords, decoder: Decoder, max_sentence_tokens: int, limit: MicroBatchLimit) -> None:
        self._text = SentenceText(subwords, max_sentence_tokens)
        self._decoder = decoder
        self._limit = limit

    def max_sentence_tokens(self) -> int:
        """Return the longest source sentence, in subwords with the end symbol."""
        return self._text.max_sentence_tokens

    def translate(
        self, sentences: Sequence[str], options: SearchOptions, token: CancelToken
    ) -> tuple[Sequence[Translation], Timings]:
        """Translate, in order. Raises InvalidSentence with every violation, Cancelled, DeadlineExceeded."""
        prepared = self._text.prepare_all(sentences, (), options)
        started_ns = time.perf_counter_ns()
        found: list[list[RawHypothesis]] = [[] for _ in sentences]
        for batch in _micro_batches(prepared, options.rows, self._limit.max_positions):
            token.check()
            searches = [sentence_search(prepared[index], options, seed=0) for index in batch]
            sources = [prepared[index].source for index in batch]
            for index, hypotheses in zip(batch, search(self._decoder, sources, searches, token.check), strict=True):
                found[index] = hypotheses
        decode_ns = time.perf_counter_ns() - started_ns
        translations = [
            self._text.translation(sentence, hypotheses, options)
            for sentence, hypotheses in zip(prepared, found, strict=True)
        ]
        text_ns = sum(sentence.text_ns for sentence in prepared)
        return translations, Timings(text_ns=text_ns, decode_ns=decode_ns)


def sentence_search(sentence: PreparedSentence, options: SearchOptions, *, seed: int) -> SentenceSearch:
    """Return how the sentence is searched."""
    return SentenceSearch(
        options=options,
        min_length=sentence.min_length,
        max_length=sentence.max_length,
        prefix=sentence.prefix,
        seed=seed,
    )


def _micro_batches(prepared: Sequence[PreparedSentence], rows: int, max_positions: int) -> Iterator[list[int]]:
    """Yield the indices of sentences in batches of similar length, longest first, each within the limit; empty ones are
    left out."""

    def positions(index: int) -> int:
        return len(prepared[index].source) + prepared[index].max_length

    batch: list[int] = []
    for index in sorted((i for i, sentence in enumerate(prepared) if sentence.source), key=lambda i: -positions(i)):
        if batch and (len(batch) + 1) * rows * positions(batch[0]) > max_positions:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
