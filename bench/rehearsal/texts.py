"""The sentences of the rehearsal: nonsense words, and what training can learn to make of them."""

from __future__ import annotations

import random
from typing import Final

_SYLLABLES: Final = ("ba", "ce", "di", "fo", "gu", "ka", "le", "mi", "no", "pu", "ra", "se", "ti", "vo", "zu")


def sentences_of(generator: random.Random, count: int) -> list[str]:
    """Return sentences of 3 to 9 words of one or two syllables."""
    words = ["".join(generator.choices(_SYLLABLES, k=generator.randint(1, 2))) for _ in range(200)]
    return [" ".join(generator.choices(words, k=generator.randint(3, 9))) for _ in range(count)]


def pairs_of(generator: random.Random, count: int) -> list[tuple[str, str]]:
    """Return sentences, each with its translation: its words in upper case, the last one first."""
    return [(source, " ".join(reversed(source.upper().split()))) for source in sentences_of(generator, count)]
