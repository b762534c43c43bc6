"""A loaded model that translates many callers' sentences at once."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Final

from ferryman_service.domain.translation import (
    CancelToken,
    ComputeType,
    FairShare,
    PreparedSentence,
    SearchOptions,
    SentenceResult,
    SentenceWork,
    Timings,
    Translation,
    slowest,
)
from ferryman_service.pipeline.text import SentenceText
from ferryman_service.search.decoder import Decoder
from ferryman_service.translation.counts import EngineCounts
from ferryman_service.translation.scheduler import Scheduler, SchedulerConfig

_WARM_UP: Final = SearchOptions(max_length=3)


class BatchingEngine:
    """A TranslationEngine over any Decoder. Safe to call from every thread until it is closed."""

    def __init__(
        self,
        decoder: Decoder,
        text: SentenceText,
        memory_bytes: int,
        config: SchedulerConfig,
        *,
        compute_type: ComputeType = ComputeType.FP32,
        counts: EngineCounts | None = None,
    ) -> None:
        """Start the decoding threads; `memory_bytes` is what the model takes, `compute_type` its arithmetic, and
        `counts` is told what the engine does."""
        self._text = text
        self._memory_bytes = memory_bytes
        self._compute_type = compute_type
        self._scheduler = Scheduler(decoder, text, config, counts)

    def max_sentence_tokens(self) -> int:
        """Return the longest source sentence, in subwords with the end symbol."""
        return self._text.max_sentence_tokens

    def memory_bytes(self) -> int:
        """Return how much memory the model takes, without what is in flight."""
        return self._memory_bytes

    def compute_type(self) -> ComputeType:
        """Return the arithmetic that the model is computed in."""
        return self._compute_type

    def cache_bytes(self) -> int:
        """Return how much memory the running batches' caches take."""
        return self._scheduler.cache_bytes()

    def drop_caches(self) -> None:
        """Let running batches go, soon, in which nothing runs."""
        self._scheduler.drop_idle_batches()

    def warm_up(self) -> None:
        """Translate a word, with a beam and greedily: buffers are made, and every part of the graphs has run once."""
        for beam_size in (1, _WARM_UP.beam_size):
            options = SearchOptions(beam_size=beam_size, max_length=_WARM_UP.max_length)
            self.translate(["a"], options, CancelToken())

    def prepare(self, sentence: str, prefix: str, options: SearchOptions) -> PreparedSentence:
        """Normalise a sentence and split it into subwords; raises InvalidSentence (fields "sentence", "prefix")."""
        return self._text.prepare(sentence, prefix, options)

    def prepare_all(
        self, sentences: Sequence[str], prefixes: Sequence[str], options: SearchOptions
    ) -> Sequence[PreparedSentence]:
        """Do so with many; raises InvalidSentence with every violation ("sentences[i]", "target_prefixes[i]")."""
        return self._text.prepare_all(sentences, prefixes, options)

    def submit(self, work: Sequence[SentenceWork]) -> None:
        """Put sentences in line; each `done` is called once."""
        self._scheduler.submit(work)

    def translate(
        self, sentences: Sequence[str], options: SearchOptions, token: CancelToken
    ) -> tuple[Sequence[Translation], Timings]:
        """Translate, in order, and wait. Raises InvalidSentence, Cancelled, DeadlineExceeded."""
        results = self.run(self._text.prepare_all(sentences, (), options), options, token)
        translations: list[Translation] = []
        for result in results:
            if result.translation is None:
                assert result.error is not None, "a sentence without a translation has an error"
                raise result.error
            translations.append(result.translation)
        return translations, slowest([result.timings for result in results])

    def run(
        self, prepared: Sequence[PreparedSentence], options: SearchOptions, token: CancelToken
    ) -> Sequence[SentenceResult]:
        """Translate prepared sentences and wait for all. Samples have the seed of the options, 0 if that is None."""
        gathered = _Gathered(len(prepared))
        share = FairShare()
        seed = 0 if options.sampling is None or options.sampling.seed is None else options.sampling.seed
        self.submit(
            [
                SentenceWork(
                    sentence=sentence,
                    options=options,
                    token=token,
                    share=share,
                    done=gathered.place(index),
                    seed=seed,
                )
                for index, sentence in enumerate(prepared)
            ]
        )
        return gathered.wait()

    def close(self) -> None:
        """End the threads, after what was submitted is translated."""
        self._scheduler.close()


class _Gathered:
    """Waits for the results of several sentences."""

    def __init__(self, count: int) -> None:
        self._results: list[SentenceResult | None] = [None] * count
        self._left = count
        self._lock = threading.Lock()
        self._all = threading.Event()
        if not count:
            self._all.set()

    def place(self, index: int) -> _Place:
        """Return what takes the result of one sentence."""
        return _Place(self, index)

    def put(self, index: int, result: SentenceResult) -> None:
        """Take a result."""
        self._results[index] = result
        with self._lock:
            self._left -= 1
            if not self._left:
                self._all.set()

    def wait(self) -> list[SentenceResult]:
        """Return all results in order, once they are there."""
        self._all.wait()
        return [result for result in self._results if result is not None]


class _Place:
    def __init__(self, gathered: _Gathered, index: int) -> None:
        self._gathered = gathered
        self._index = index

    def __call__(self, result: SentenceResult) -> None:
        self._gathered.put(self._index, result)
