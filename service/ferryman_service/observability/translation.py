"""What is translated, what waits, and where the time goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from ferryman_service.domain.translation import Timings, Translation

_SECONDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_TOKENS: Final = (1, 2, 5, 10, 20, 30, 40, 60, 80, 120, 200, 400, 1000)
_ROWS: Final = (1, 2, 5, 10, 20, 40, 80, 160, 320, 640, 1280)
_CALL_STAGES: Final = ("queue", "text", "encode", "decode")
_SENTENCE_STAGES: Final = ("queue", "encode", "decode")
_METHODS: Final = ("Translate", "StreamTranslate")


class TranslationMetrics:
    """ferryman_translate_*. `queued_tokens` tells the row tokens of unary calls and of streams that wait or run."""

    def __init__(self, registry: CollectorRegistry, queued_tokens: Callable[[], tuple[int, int]]) -> None:
        def counter(name: str, text: str) -> Counter:
            return Counter(f"ferryman_translate_{name}_total", text, registry=registry)

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(f"ferryman_translate_{name}", text, buckets=buckets, registry=registry)

        def stages(name: str, text: str, labels: Sequence[str]) -> dict[str, Histogram]:
            seconds = Histogram(f"ferryman_translate_{name}", text, ("stage",), buckets=_SECONDS, registry=registry)
            return {label: seconds.labels(label) for label in labels}

        def gauge(name: str, text: str) -> list[Gauge]:
            made = Gauge(f"ferryman_translate_{name}", text, ("method",), registry=registry)
            return [made.labels(method) for method in _METHODS]

        self._sentences = counter("sentences", "Sentences translated.")
        self._source_tokens = counter("source_tokens", "Subwords of the sentences, end symbols included.")
        self._target_tokens = counter("target_tokens", "Subwords of the best translations, end symbols included.")
        self._rejected = counter("rejected", "Translate calls that found the queue full.")
        self._seconds = stages("seconds", "Time of a Translate call, by stage.", _CALL_STAGES)
        self._sentence_seconds = stages("sentence_seconds", "Time of a sentence, by stage.", _SENTENCE_STAGES)
        self._length = histogram(
            "sentence_target_tokens", "Subwords of a best translation, end symbol included.", _TOKENS
        )
        self._steps = histogram("sentence_steps", "Decoding steps of a sentence.", _TOKENS)
        self._batch_rows = histogram("batch_rows", "Rows of a decoding step, mean over a Translate call's.", _ROWS)
        self._in_flight = dict(zip(_METHODS, gauge("in_flight", "Calls that are being served."), strict=True))
        calls, streams = gauge("queue_tokens", "Source subwords times rows that wait or run.")
        calls.set_function(lambda: queued_tokens()[0])
        streams.set_function(lambda: queued_tokens()[1])

    @contextmanager
    def in_flight(self, method: str) -> Iterator[None]:
        """Count a call of "Translate" or "StreamTranslate" while the block runs."""
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
