"""Parallel corpora."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final


class Split(enum.StrEnum):
    """The use of a part of a corpus."""

    TRAIN = "train"
    VALIDATION = "validation"


class Side(enum.StrEnum):
    """A side of a corpus."""

    SOURCE = "source"
    TARGET = "target"


SAMPLES: Final = 3
"""Pairs of a split that are shown, at most."""
_SHOWN_CHARACTERS: Final = 200


def shortened(text: str) -> str:
    """Return the text, or the beginning of it and an ellipsis: 200 characters at most."""
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"


@dataclass(frozen=True, kw_only=True)
class SentencePair:
    """A sentence and its translation."""

    source: str
    target: str

    def shortened(self) -> SentencePair:
        """Return the pair as it is shown."""
        return SentencePair(source=shortened(self.source), target=shortened(self.target))


@dataclass(frozen=True, kw_only=True)
class CorpusWarning:
    """Something that was probably not meant: `count` of `total` lines or pairs are so, the first of them is `example`.

    `field` is a split or a file ("train.source"); `code` is a stable UPPER_SNAKE_CASE name.
    """

    code: str
    field: str
    message: str
    count: int
    total: int
    example: str


@dataclass(frozen=True, kw_only=True)
class SplitStatistics:
    """What a part of a corpus holds. Words are separated by white space; empty pairs have an empty side. `samples` are
    SAMPLES pairs at most, shortened."""

    pairs: int
    source_words: int
    target_words: int
    empty_pairs: int
    samples: Sequence[SentencePair]
    warnings: Sequence[CorpusWarning] = ()


@dataclass(frozen=True, kw_only=True)
class CorpusHeader:
    """What the caller says about a corpus."""

    display_name: str
    source_language: str
    target_language: str


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A stored corpus; it never changes. `digest` is the SHA-256 of its content, hexadecimal."""

    corpus_id: str
    header: CorpusHeader
    train: SplitStatistics
    validation: SplitStatistics
    digest: str
    create_time_ns: int

    @property
    def place(self) -> str:
        """Where the corpus stands in lists, which are ordered by time; it says so also when the corpus is gone."""
        return f"{self.create_time_ns}/{self.corpus_id}"

    @property
    def warnings(self) -> Sequence[CorpusWarning]:
        """What was probably not meant, of both splits."""
        return (*self.train.warnings, *self.validation.warnings)


@dataclass(frozen=True, kw_only=True)
class CorpusFiles:
    """The four files of a corpus: UTF-8, one sentence a line, "\\n" after every line, equal line counts per split."""

    files: Mapping[tuple[Split, Side], Path]
