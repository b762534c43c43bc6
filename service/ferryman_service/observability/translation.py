"""What is translated, what waits, and where the time goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from prometheus_client import CollectorRegistry

from ferryman_service.domain.translation import Timings, Translation
from ferryman_service.observability.definitions import ROWS, counter, gauge, histogram

_SECONDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_TOKENS: Final = (1, 2, 5, 10, 20, 30, 40, 60, 80, 120, 200, 400, 1000)
_CALL_STAGES: Final = ("queue", "text", "encode", "decode")
_SENTENCE_STAGES: Final = ("queue", "encode", "decode")
_METHODS: Final = ("Translate", "StreamTranslate")

REQUESTS: Final = counter("ferryman_translate_requests_total", "Calls received.", ("method",))
IN_FLIGHT: Final = gauge("ferryman_translate_in_flight", "Calls in flight.", ("method",))
QUEUE: Final = gauge(
    "ferryman_translate_queue_tokens",
    "Tokens that wait or run. Each row counts its source subwords, or half of max_length if the caller raised "
    "max_length.",
    ("method",),
    "tokens",
)
QUEUE_LIMIT: Final = gauge(
    "ferryman_translate_queue_limit_tokens",
    "Limit of the queue. Beyond it, Translate calls are refused and StreamTranslate calls wait.",
    ("method",),
    "tokens",
)
REJECTED: Final = counter("ferryman_translate_rejected_total", "Translate calls refused because the queue was full.")
SENTENCES: Final = counter("ferryman_translate_sentences_total", "Sentences translated.")
SOURCE_TOKENS: Final = counter(
    "ferryman_translate_source_tokens_total", "Source subwords translated, including end symbols.", unit="tokens"
)
TARGET_TOKENS: Final = counter(
    "ferryman_translate_target_tokens_total", "Subwords of the best translations, including end symbols.", unit="tokens"
)
CALL_SECONDS: Final = histogram(
    "ferryman_translate_seconds", "Duration of a Translate call, by stage.", _SECONDS, ("stage",)
)
SENTENCE_SECONDS: Final = histogram(
    "ferryman_translate_sentence_seconds", "Duration of a sentence, by stage.", _SECONDS, ("stage",)
)
SENTENCE_TOKENS: Final = histogram(
    "ferryman_translate_sentence_target_tokens",
    "Subwords of the best translation of a sentence, including the end symbol.",
    _TOKENS,
    unit="tokens",
)
SENTENCE_STEPS: Final = histogram(
    "ferryman_translate_sentence_steps", "Decoding steps per sentence.", _TOKENS, unit="steps"
)
BATCH_ROWS: Final = histogram(
    "ferryman_translate_batch_rows", "Mean number of rows per decoding step of a Translate call.", ROWS, unit="rows"
)
METRICS: Final = (
    REQUESTS,
    IN_FLIGHT,
    QUEUE,
    QUEUE_LIMIT,
    REJECTED,
    SENTENCES,
    SOURCE_TOKENS,
    TARGET_TOKENS,
    CALL_SECONDS,
    SENTENCE_SECONDS,
    SENTENCE_TOKENS,
    SENTENCE_STEPS,
    BATCH_ROWS,
)


class TranslationMetrics:
    """ferryman_translate_*. `queued_tokens` tells the row tokens of unary calls and of streams that wait or run, from
    every thread; `limit_tokens` is how many of each may."""

    def __init__(
        self, registry: CollectorRegistry, queued_tokens: Callable[[], tuple[int, int]], limit_tokens: int
    ) -> None:
        requests, in_flight = REQUESTS.counter(registry), IN_FLIGHT.gauge(registry)
        self._requests = {method: requests.labels(method) for method in _METHODS}
        self._in_flight = {method: in_flight.labels(method) for method in _METHODS}
        queue, limit = QUEUE.gauge(registry), QUEUE_LIMIT.gauge(registry)
        for place, method in enumerate(_METHODS):
            queue.labels(method).set_function(lambda place=place: queued_tokens()[place])  # type: ignore[misc]
            limit.labels(method).set(limit_tokens)
        self._rejected = REJECTED.counter(registry)
        self._sentences = SENTENCES.counter(registry)
        self._source_tokens, self._target_tokens = SOURCE_TOKENS.counter(registry), TARGET_TOKENS.counter(registry)
        seconds, sentence_seconds = CALL_SECONDS.histogram(registry), SENTENCE_SECONDS.histogram(registry)
        self._seconds = {stage: seconds.labels(stage) for stage in _CALL_STAGES}
        self._sentence_seconds = {stage: sentence_seconds.labels(stage) for stage in _SENTENCE_STAGES}
        self._length = SENTENCE_TOKENS.histogram(registry)
        self._steps = SENTENCE_STEPS.histogram(registry)
        self._batch_rows = BATCH_ROWS.histogram(registry)

    @contextmanager
    def in_flight(self, method: str) -> Iterator[None]:
        """Count a call of "Translate" or "StreamTranslate", and have it in flight while the block runs."""
        self._requests[method].inc()
        with self._in_flight[method].track_inprogress():
            yield

    def rejected(self) -> None:
        """Count a call that found the queue full."""
        self._rejected.inc()

    def observe_call(self, timings: Timings, mean_batch_rows: float) -> None:
        """Count a Translate call that succeeded."""
        for stage, seconds in self._seconds.items():
            seconds.observe(getattr(timings, f"{stage}_ns") / 1e9)
        if timings.steps:
            self._batch_rows.observe(mean_batch_rows)

    def observe_sentences(self, translations: Sequence[Translation], timings: Sequence[Timings]) -> None:
        """Count translations, and the timings of the sentences that they are of: more than translations if texts were
        split."""
        self._sentences.inc(len(timings))
        self._source_tokens.inc(sum(translation.source_tokens for translation in translations))
        for translation in translations:
            if translation.hypotheses:  # a search may find none
                self._target_tokens.inc(translation.hypotheses[0].target_tokens)
                self._length.observe(translation.hypotheses[0].target_tokens)
        for sentence in timings:
            self._steps.observe(sentence.steps)
            for stage, seconds in self._sentence_seconds.items():
                seconds.observe(getattr(sentence, f"{stage}_ns") / 1e9)
