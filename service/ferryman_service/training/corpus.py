"""Reading a corpus: which pairs are used, and why the others are not.

Shape suffixes: C pairs of a chunk.
"""

from __future__ import annotations

import enum
import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ferryman_service.domain.corpora import CorpusFiles, Side, Split
from ferryman_service.domain.runs import FailureReason, TrainingFailed
from ferryman_service.text.normalise import find_marks, has_control_characters, normalise

_CHUNK_PAIRS: Final = 16_384


class DropReason(enum.StrEnum):
    """Why a pair is not used. A pair that has several reasons counts for the first."""

    EMPTY = "EMPTY"
    CONTROL_CHARACTERS = "CONTROL_CHARACTERS"
    TOO_MANY_MARKS = "TOO_MANY_MARKS"
    DUPLICATE = "DUPLICATE"
    TOO_LONG = "TOO_LONG"
    LENGTH_RATIO = "LENGTH_RATIO"


@dataclass(frozen=True, kw_only=True)
class TextPair:
    """A usable pair: both sides normalised."""

    source: str
    target: str


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
    seen = SeenKeys()
    pairs = read_pairs(corpus, split)
    while chunk := list(islice(pairs, _CHUNK_PAIRS)):
        usable = list(_usable(chunk, dropped))
        if keep_duplicates:
            yield from usable
            continue
        is_new_C = seen.add(np.array([_key(pair) for pair in usable], np.uint64))
        for pair, is_new in zip(usable, is_new_C.tolist(), strict=True):
            if is_new:
                yield pair
            else:
                dropped[DropReason.DUPLICATE] += 1


class SeenKeys:
    """A set of 64-bit keys, eight bytes each: sorted arrays, each more than twice as long as the next, as the levels of
    a log-structured merge tree are (O'Neil et al., 1996)."""

    def __init__(self) -> None:
        self._levels: list[NDArray[np.uint64]] = []

    @property
    def levels(self) -> int:
        """The number of arrays: at most the logarithm of the number of keys, to the base 2."""
        return len(self._levels)

    def add(self, keys_C: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Add keys, and return which of them are new: in none of the calls before, nor earlier in this one."""
        is_new_C = np.zeros(len(keys_C), np.bool_)
        keys, firsts = np.unique(keys_C, return_index=True)
        is_new = np.ones(len(keys), np.bool_)
        for level in self._levels:
            place = np.minimum(np.searchsorted(level, keys), len(level) - 1)
            is_new &= level[place] != keys
        is_new_C[firsts[is_new]] = True
        self._push(keys[is_new])
        return is_new_C

    def _push(self, keys: NDArray[np.uint64]) -> None:
        while self._levels and len(self._levels[-1]) <= 2 * len(keys):
            keys = np.concatenate((self._levels.pop(), keys))
            keys.sort(kind="stable")  # merges sorted runs
        if len(keys):
            self._levels.append(keys)


def describe_drops(dropped: Counter[DropReason], total: int) -> str:
    """Say how many of `total` pairs were dropped, and why: "12 of 29000 (3 EMPTY, 9 DUPLICATE)"."""
    reasons = ", ".join(f"{dropped[reason]} {reason}" for reason in DropReason if dropped[reason])
    return f"{dropped.total()} of {total} ({reasons})"


def _read_lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8", newline="\n") as file:
        for line in file:
            yield line.removesuffix("\n")


def _usable(chunk: list[tuple[str, str]], dropped: Counter[DropReason]) -> Iterator[TextPair]:
    """Yield the pairs that hold text and nothing else, counting the others."""
    for raw_source, raw_target in chunk:
        if find_marks(raw_source) is not None or find_marks(raw_target) is not None:
            dropped[DropReason.TOO_MANY_MARKS] += 1  # of a corpus of an earlier release: uploads refuse them
            continue
        source, target = normalise(raw_source), normalise(raw_target)
        if not source or not target:
            dropped[DropReason.EMPTY] += 1
        elif has_control_characters(raw_source) or has_control_characters(raw_target):
            dropped[DropReason.CONTROL_CHARACTERS] += 1
        else:
            yield TextPair(source=source, target=target)


def _key(pair: TextPair) -> int:
    # 8 bytes a pair instead of the text: of ten million pairs two share them with a probability of 3e-6, and then one
    # is left out.
    digest = hashlib.blake2b(f"{pair.source}\n{pair.target}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
