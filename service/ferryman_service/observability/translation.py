"""What is translated, and where the time goes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram

from ferryman_service.domain.translation import Timings, Translation

_SECONDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class TranslationMetrics:
    """ferryman_translate_*."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str) -> Counter:
            return Counter(f"ferryman_translate_{name}_total", text, registry=registry)

        self._sentences = counter("sentences", "Sentences translated.")
        self._source_tokens = counter("source_tokens", "Subwords of the sentences, end symbols included.")
        self._target_tokens = counter("target_tokens", "Subwords of the best translations, end symbols included.")
        self._seconds = Histogram(
            "ferryman_translate_seconds",
            "Time of a Translate call, by stage.",
            ("stage",),
            buckets=_SECONDS,
            registry=registry,
        )

    def observe(self, translations: Sequence[Translation], timings: Timings) -> None:
        """Count a call that succeeded."""
        self._sentences.inc(len(translations))
        self._source_tokens.inc(sum(translation.source_tokens for translation in translations))
        self._target_tokens.inc(sum(translation.hypotheses[0].target_tokens for translation in translations))
        for stage in ("queue", "text", "encode", "decode"):
            self._seconds.labels(stage).observe(getattr(timings, f"{stage}_ns") / 1e9)
