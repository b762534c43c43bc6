"""The memory that the caches of running batches may come to take, booked before a sentence joins."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from ferryman_service.domain.translation import PreparedSentence

_FIRST_POSITIONS: Final = 32
_OF_OTHERS: Final = 7 / 8


class CacheMemory:
    """A limit on the bytes of all engines' caches together, and what is booked of it. Safe to use from every thread."""

    def __init__(self, limit_bytes: int = 0) -> None:
        """Store the limit; 0 is none."""
        self.limit_bytes = limit_bytes
        self._booked_bytes = 0
        self._lock = threading.Lock()

    @property
    def booked_bytes(self) -> int:
        """What is booked now."""
        return self._booked_bytes

    def change(self, change_bytes: int, *, is_small: bool = True, must: bool = False) -> bool:
        """Book more, or less if negative; return False, and book nothing, if more has no room and is no `must`. An
        eighth of the limit is kept for sentences of small calls."""
        with self._lock:
            limit = self.limit_bytes if is_small else self.limit_bytes * _OF_OTHERS
            if change_bytes > 0 and not must and self.limit_bytes and self._booked_bytes + change_bytes > limit:
                return False
            self._booked_bytes += change_bytes
            return True


@dataclass(frozen=True, kw_only=True)
class CacheShape:
    """What a model's caches take: bytes for each position of a row, and for each source position of a sentence. On a
    GPU sentences come in powers of two."""

    row_position_bytes: int = 0
    source_position_bytes: int = 0
    powers_of_two: bool = False

    def size_bytes(self, width: int, sentences: int, positions: int, source_positions: int) -> int:
        """Return what a batch takes at most, with so many rows for each sentence, if each is as long as the longest."""
        if self.powers_of_two:
            sentences = _power_of_two(sentences)
        row_bytes = width * _power_of_two(max(positions, _FIRST_POSITIONS)) * self.row_position_bytes
        return sentences * (row_bytes + _power_of_two(source_positions) * self.source_position_bytes)


NO_SHAPE: Final = CacheShape()
"""Caches that take nothing, as far as anybody knows."""


@dataclass
class _Batch:
    """The sentences in a batch, and the most that it has held since it was empty: its memory does not shrink before."""

    sentences: int = 0
    most_sentences: int = 0
    positions: int = 1
    source_positions: int = 1
    booked_bytes: int = 0


class CacheBooking:
    """What one decoding thread has booked for each of its batches, which are told apart by width and size. Used by that
    thread alone."""

    def __init__(self, memory: CacheMemory, shape: CacheShape) -> None:
        self._memory = memory
        self._shape = shape
        self._batches: dict[tuple[int, int], _Batch] = {}

    def join(self, key: tuple[int, int], sentence: PreparedSentence, *, is_small: bool, must: bool) -> bool:
        """Book what one more sentence makes a batch take, whose key begins with its width; return False if there is no
        room, unless it `must` have it."""
        batch = self._batches.get(key, _Batch())
        grown = _Batch(
            sentences=batch.sentences + 1,
            most_sentences=max(batch.most_sentences, batch.sentences + 1),
            positions=max(batch.positions, sentence.max_length),
            source_positions=max(batch.source_positions, len(sentence.source)),
        )
        grown.booked_bytes = self._shape.size_bytes(
            key[0], grown.most_sentences, grown.positions, grown.source_positions
        )
        if not self._memory.change(grown.booked_bytes - batch.booked_bytes, is_small=is_small, must=must):
            return False
        self._batches[key] = grown
        return True

    def settle(self, sentences: Mapping[tuple[int, int], int]) -> None:
        """Note how many sentences each batch has now; give back what empty ones had booked."""
        for key, batch in list(self._batches.items()):
            batch.sentences = sentences.get(key, 0)
            if not batch.sentences:
                self._memory.change(-batch.booked_bytes)
                del self._batches[key]


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()
