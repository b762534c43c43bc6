"""What the log and the traces are told of translating: models always, sentences only where that is allowed."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from ferryman_service.application.translating import TranslateResult
from ferryman_service.application.translation_stream import StreamResult
from ferryman_service.domain.errors import InvalidRequest
from ferryman_service.domain.log_context import FIELDS, add_log_fields
from ferryman_service.domain.models import ModelVersion, parse_model_reference
from ferryman_service.domain.tracing import NULL_TRACER, Tracer
from ferryman_service.domain.translation import Translation
from ferryman_service.observability.tracing import StageSpans

_log = logging.getLogger(__name__)


class TranslationWatch:
    """Belongs to the service; what it is told goes to the call at hand."""

    def __init__(self, tracer: Tracer, *, log_sentences: bool = False) -> None:
        self._tracer = tracer
        self._log_sentences = log_sentences

    def model_named(self, model: str) -> None:
        """Note what the caller calls the model; what cannot be a model's name is left out."""
        with contextlib.suppress(InvalidRequest):
            add_log_fields(model=str(parse_model_reference(model)))

    def sentences_read(self, sentences: Iterable[str]) -> None:
        """Log what is to be translated."""
        if self._log_sentences:
            texts = list(sentences)
            _log.info("sentences to translate: %d", len(texts), extra={FIELDS: {"sentences": texts}})

    def call_translated(self, result: TranslateResult) -> None:
        """Note the result of a unary call."""
        self.version_chosen(result.version)
        self.sentences_translated(result.translations)
        if self._tracer.is_recording():
            stages = StageSpans()
            stages.add(result.sentences, result.translations)
            stages.record(self._tracer)

    @contextmanager
    def stream(self) -> Iterator[StreamWatch]:
        """Watch a stream until the block ends."""
        stages = StageSpans()
        try:
            yield StreamWatch(self, stages if self._tracer.is_recording() else None)
        finally:
            stages.record(self._tracer)

    def version_chosen(self, version: ModelVersion) -> None:
        """Note the version that translates."""
        add_log_fields(model=version.reference)
        self._tracer.annotate({"ferryman.model": version.reference})

    def sentences_translated(self, translations: Sequence[Translation]) -> None:
        """Log translations."""
        if self._log_sentences:
            texts = [translation.hypotheses[0].text if translation.hypotheses else "" for translation in translations]
            _log.info("sentences translated: %d", len(texts), extra={FIELDS: {"translations": texts}})


class StreamWatch:
    """One stream's part of the watch."""

    def __init__(self, watch: TranslationWatch, stages: StageSpans | None) -> None:
        self._watch = watch
        self._stages = stages

    def accepted(self, version: ModelVersion) -> None:
        """Note the version that translates."""
        self._watch.version_chosen(version)

    def translated(self, results: Sequence[StreamResult]) -> None:
        """Note results."""
        if self._stages is not None:
            for result in results:
                self._stages.add(result.timings, _translations([result]))
        self._watch.sentences_translated(_translations(results))


def _translations(results: Sequence[StreamResult]) -> list[Translation]:
    return [result.outcome for result in results if isinstance(result.outcome, Translation)]


DEFAULT_WATCH: Final = TranslationWatch(NULL_TRACER)
"""Without traces, and without sentences in the log."""
