"""Translates many sentences in batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from ferryman import Client, EarlyStopping

BATCH_SENTENCES: Final = 100
TIMEOUT_S: Final = 300.0


def translate_all(
    client: Client,
    model: str,
    sentences: Sequence[str],
    beam_size: int | None = None,
    early_stopping: EarlyStopping | None = None,
) -> list[str]:
    """Return the best translation of each sentence. None selects the service's default."""
    texts: list[str] = []
    for start in range(0, len(sentences), BATCH_SENTENCES):
        batch = sentences[start : start + BATCH_SENTENCES]
        result = client.translate(model, batch, beam_size=beam_size, early_stopping=early_stopping, timeout_s=TIMEOUT_S)
        texts += [translation.text for translation in result.translations]
    return texts
