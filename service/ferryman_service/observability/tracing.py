"""Traces: the tracer of a process, and the spans of a call that are made of its sentences' timings afterwards."""

from __future__ import annotations

import importlib.util
import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Final

from ferryman_service.domain.tracing import NULL_TRACER, Tracer
from ferryman_service.domain.translation import Timings, Translation

_log = logging.getLogger(__name__)
_PACKAGES: Final = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.grpc")
_STAGES: Final = ("text", "admission", "encode", "decode")
_NS_PER_S: Final = 1e9


@dataclass(frozen=True, kw_only=True)
class TraceConfig:
    """Where traces go (an empty `endpoint`: nowhere), which share of those that begin here is kept, and the
    service.name of this process."""

    endpoint: str = ""
    sample_ratio: float = 1.0
    service: str = "ferryman-service"


def open_tracer(config: TraceConfig) -> Tracer:
    """Return the tracer of this process, to be closed at its end. It keeps nothing without an endpoint; nor, which is
    said, without OpenTelemetry's packages, or if they cannot be set up as the environment (OTEL_…) tells them to."""
    if not config.endpoint:
        return NULL_TRACER
    if missing := [name for name in _PACKAGES if not _is_installed(name)]:
        _log.warning(
            "no traces are sent, since %s is not installed: install the extra tracing, or leave --trace-endpoint out",
            missing[0],
        )
        return NULL_TRACER
    release = version("ferryman")
    try:
        from ferryman_service.observability.otel import OtelTracer, otlp_provider

        return OtelTracer(otlp_provider(config.endpoint, config.sample_ratio, config.service, release), release)
    except Exception as error:  # noqa: BLE001 (whatever of its own settings it does not like: translating goes on)
        _log.warning("no traces are sent, since OpenTelemetry cannot be set up: %s: %s", type(error).__name__, error)
        return NULL_TRACER


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of the package that it lies in
        return False


class StageSpans:
    """When the sentences of one call were prepared, waited, were encoded and decoded: four spans, however many
    sentences. Each lasts from the first sentence's begin of the stage to the last one's end."""

    def __init__(self) -> None:
        # A stage's first begin, last end, time of all sentences, and the longest; on the clock of perf_counter.
        self._begin_ns = dict.fromkeys(_STAGES, 0)
        self._end_ns = dict.fromkeys(_STAGES, 0)
        self._sum_ns = dict.fromkeys(_STAGES, 0)
        self._most_ns = dict.fromkeys(_STAGES, 0)
        self._sentences = self._steps = self._most_steps = self._row_steps = 0
        self._source_tokens = self._target_tokens = 0

    def add(self, sentences: Sequence[Timings], translations: Iterable[Translation]) -> None:
        """Take sentences that were handed in together, and the translations that they are of."""
        now_ns = time.perf_counter_ns()
        submitted_ns = now_ns
        for timings in sentences:
            decoding_ns = (timings.end_ns or now_ns) - timings.decode_ns
            encoding_ns = decoding_ns - timings.encode_ns
            waiting_ns = encoding_ns - timings.queue_ns
            submitted_ns = min(submitted_ns, waiting_ns)
            self._add("admission", waiting_ns, timings.queue_ns)
            self._add("encode", encoding_ns, timings.encode_ns)
            self._add("decode", decoding_ns, timings.decode_ns)
            self._steps += timings.steps
            self._row_steps += timings.row_steps
            self._most_steps = max(self._most_steps, timings.steps)
        if sentences:
            text_ns = sum(timings.text_ns for timings in sentences)
            self._add("text", submitted_ns - text_ns, text_ns)
        self._sentences += len(sentences)
        for translation in translations:
            self._source_tokens += translation.source_tokens
            self._target_tokens += sum(hypothesis.target_tokens for hypothesis in translation.hypotheses[:1])

    def record(self, tracer: Tracer) -> None:
        """Keep the spans, as children of the one around."""
        if not self._sentences:
            return
        epoch_ns = time.time_ns() - time.perf_counter_ns()
        for stage in _STAGES:
            attributes: dict[str, str | int | float | bool] = {
                "ferryman.sentences": self._sentences,
                "ferryman.mean_seconds": self._sum_ns[stage] / self._sentences / _NS_PER_S,
                "ferryman.longest_seconds": self._most_ns[stage] / _NS_PER_S,
            }
            if stage == "encode":
                attributes["ferryman.source_tokens"] = self._source_tokens
            if stage == "decode":
                attributes |= {
                    "ferryman.target_tokens": self._target_tokens,
                    "ferryman.steps": self._most_steps,
                    "ferryman.sentence_steps": self._steps,
                    "ferryman.mean_batch_rows": self._row_steps / self._steps if self._steps else 0.0,
                }
            tracer.past(stage, epoch_ns + self._begin_ns[stage], epoch_ns + self._end_ns[stage], attributes)

    def _add(self, stage: str, begin_ns: int, duration_ns: int) -> None:
        end_ns = begin_ns + duration_ns
        begin = self._begin_ns[stage]
        self._begin_ns[stage] = begin_ns if not begin else min(begin, begin_ns)
        self._end_ns[stage] = max(self._end_ns[stage], end_ns)
        self._sum_ns[stage] += duration_ns
        self._most_ns[stage] = max(self._most_ns[stage], duration_ns)
