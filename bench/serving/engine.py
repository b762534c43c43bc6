"""Our engine as a `TokenEngine`: subwords in, subwords out. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from bench.shared.commands import Found, TokenSearch
from ferryman_service.domain.translation import (
    CancelToken,
    ComputeType,
    PreparedSentence,
    SearchOptions,
    SentenceResult,
    Translation,
)
from ferryman_service.translation.engine import BatchingEngine
from ferryman_service.translation.loader import OnnxBundleLoader
from ferryman_service.translation.onnx_model import OnnxConfig
from ferryman_service.translation.scheduler import SchedulerConfig


class Engine(Protocol):
    """An engine that translates prepared sentences and waits for all of them, such as BatchingEngine."""

    def run(
        self, prepared: Sequence[PreparedSentence], options: SearchOptions, token: CancelToken
    ) -> Sequence[SentenceResult]:
        """Return the results in order."""
        ...


def open_engine(bundle: Path, compute_type: ComputeType, threads: int) -> BatchingEngine:
    """Load a bundle with so many decoding threads; raises ModelDamaged."""
    loader = OnnxBundleLoader(OnnxConfig(compute_type=compute_type), SchedulerConfig(threads=threads))
    return loader.load(bundle)


def translate_tokens(
    engine: Engine, sentences: Sequence[PreparedSentence], options: SearchOptions
) -> list[Translation]:
    """Return the translations of all sentences in order; raises a sentence's error."""
    translations = []
    for result in engine.run(sentences, options, CancelToken()):
        if result.translation is None:
            assert result.error is not None, "a sentence without a translation has an error"
            raise result.error
        translations.append(result.translation)
    return translations


class FerrymanEngine:
    """A TokenEngine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def prepare(self, sentence: Sequence[int]) -> tuple[int, ...]:
        """Return the sentence's subwords."""
        return tuple(sentence)

    def translate(self, prepared: Sequence[tuple[int, ...]], search: TokenSearch) -> list[Translation]:
        """Translate all sentences; the engine makes its own batches."""
        options = SearchOptions(beam_size=search.beam_size, length_penalty=1.0)
        min_length = search.max_length if search.forced else 0
        sentences = [
            PreparedSentence(source=source, min_length=min_length, max_length=search.max_length) for source in prepared
        ]
        return translate_tokens(self._engine, sentences, options)

    def read(self, result: Sequence[Translation]) -> list[Found]:
        """Return the best translations."""
        best = [translation.hypotheses[0] for translation in result]
        return [Found(tokens=hypothesis.tokens, score=hypothesis.score) for hypothesis in best]
