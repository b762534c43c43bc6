"""Reading a corpus: which pairs are used, and why the others are not."""

from __future__ import annotations

import enum
import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ferryman_service.domain.corpora import CorpusFiles, Side, Split
from ferryman_service.domain.runs import FailureReason, TrainingFailed
from ferryman_service.text.normalise import has_control_characters, normalise


class DropReason(enum.StrEnum):
    """Why a pair is not used. A pair that has several reasons counts for the first."""

    EMPTY = "EMPTY"
    CONTROL_CHARACTERS = "CONTROL_CHARACTERS"
    DUPLICATE = "DUPLICATE"
    TOO_LONG = "TOO_LONG"
    LENGTH_RATIO = "LENGTH_RATIO"


@dataclass(frozen=True, kw_only=True)
class TextPair:
    """A usable pair: both sides normalised, and the target as it stands in the file, trimmed."""

    source: str
    target: str
    raw_target: str


def read_pairs(corpus: CorpusFiles, split: Split) -> Iterator[tuple[str, str]]:
    """Yield the lines of both sides, as they stand. Only a line feed ends a line.

    Raises TrainingFailed (CORPUS_DAMAGED) if a file is missing, is not UTF-8 or has fewer lines than the other.
    """
    source, target = (_read_lines(corpus.files[split, side]) for side in Side)
    try:
        yield from zip(source, target, strict=True)
    except ValueError as error:  # UnicodeDecodeError is one; the other is zip's
        raise TrainingFailed(FailureReason.CORPUS_DAMAGED, f"the {split} part of the corpus: {error}") from error
    except FileNotFoundError as error:
        message = f"the {split} part of the corpus is gone: {error.filename}"
        raise TrainingFailed(FailureReason.CORPUS_DAMAGED, message) from error


def clean_pairs(
    corpus: CorpusFiles, split: Split, dropped: Counter[DropReason], *, keep_duplicates: bool = False
) -> Iterator[TextPair]:
    """Yield the pairs whose text is usable, counting the others in `dropped`."""
    seen: set[bytes] = set()
    for raw_source, raw_target in read_pairs(corpus, split):
        source, target = normalise(raw_source), normalise(raw_target)
        if not source or not target:
            dropped[DropReason.EMPTY] += 1
        elif has_control_characters(raw_source) or has_control_characters(raw_target):
            dropped[DropReason.CONTROL_CHARACTERS] += 1
        elif not keep_duplicates and _seen_before(seen, source, target):
            dropped[DropReason.DUPLICATE] += 1
        else:
            yield TextPair(source=source, target=target, raw_target=raw_target.strip())


def describe_drops(dropped: Counter[DropReason], total: int) -> str:
    """Say how many of `total` pairs were dropped, and why: "12 of 29000 (3 EMPTY, 9 DUPLICATE)"."""
    reasons = ", ".join(f"{dropped[reason]} {reason}" for reason in DropReason if dropped[reason])
    return f"{dropped.total()} of {total} ({reasons})"


def _read_lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8", newline="\n") as file:
        for line in file:
            yield line.removesuffix("\n")


def _seen_before(seen: set[bytes], source: str, target: str) -> bool:
    # 12 bytes a pair instead of the text: among a billion pairs two share them with a probability of 1e-11.
    key = hashlib.blake2b(f"{source}\n{target}".encode(), digest_size=12).digest()
    if key in seen:
        return True
    seen.add(key)
    return False
