"""Tokenised sentence pairs as flat arrays, which may lie in files.

Shape suffixes: P pairs, N tokens of all pairs of one side, B sentences, L positions of the longest of them.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from ferryman_service.domain.cleanup import clean_up
from ferryman_service.domain.tokens import EOS, PAD

_SIDES: Final = ("source", "target")
_TOKEN_BYTES: Final = 4
_READ_WHOLE_BYTES: Final = 64 << 20  # memory is quicker than a file


class TokenFile:
    """Tokens that stay in their file. They are not mapped: pages that were read would count as this process's memory,
    more and more of them until the whole file does."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def __len__(self) -> int:
        return os.fstat(self._descriptor).st_size // _TOKEN_BYTES

    def __getitem__(self, place: slice) -> NDArray[np.int32]:
        """Return the tokens of a slice, which has a start and an end and no step."""
        return self.sentences(np.array([place.start]), np.array([place.stop - place.start]))

    def sentences(self, starts_B: NDArray[np.int64], lengths_B: NDArray[np.integer]) -> NDArray[np.int32]:
        """Return the tokens of the sentences, one after the other."""
        offsets, sizes = (starts_B * _TOKEN_BYTES).tolist(), (lengths_B * _TOKEN_BYTES).tolist()
        parts = [os.pread(self._descriptor, size, offset) for size, offset in zip(sizes, offsets, strict=True)]
        return np.frombuffer(b"".join(parts), np.int32)


@dataclass(frozen=True)
class TokenSide:
    """One side of the pairs: sentence p is tokens_N[starts_P[p] : starts_P[p] + lengths_P[p]], end symbol included."""

    tokens_N: NDArray[np.int32] | TokenFile
    starts_P: NDArray[np.int64]
    lengths_P: NDArray[Any]

    @classmethod
    def from_lengths(cls, tokens_N: NDArray[np.int32] | TokenFile, lengths_P: NDArray[np.integer]) -> TokenSide:
        """Return the side whose sentences follow one another without a gap."""
        starts_P = np.cumsum(lengths_P, dtype=np.int64)
        assert len(tokens_N) == (starts_P[-1] if len(starts_P) else 0)
        starts_P -= lengths_P
        return cls(tokens_N, starts_P, lengths_P)

    @classmethod
    def from_sentences(cls, sentences: Sequence[Sequence[int]]) -> TokenSide:
        """Return the side that holds these subword ids, to each of which an end symbol is added."""
        tokens_N, lengths_P = _flatten(sentences)
        return cls.from_lengths(tokens_N, lengths_P)

    def padded(self, index_B: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return tokens_BL of the given sentences, padded at the end with PAD."""
        lengths_B = self.lengths_P[index_B]
        position_L = np.arange(lengths_B.max())
        real_BL = position_L < lengths_B[:, None]
        tokens_BL = np.full(real_BL.shape, PAD, dtype=np.int64)
        starts_B = self.starts_P[index_B]
        if isinstance(self.tokens_N, TokenFile):
            tokens_BL[real_BL] = self.tokens_N.sentences(starts_B, lengths_B)
        else:
            tokens_BL[real_BL] = self.tokens_N[(starts_B[:, None] + position_L)[real_BL]]
        return tokens_BL

    def sentence(self, index: int) -> list[int]:
        """Return the subword ids of a sentence, end symbol included."""
        start = self.starts_P[index]
        tokens: list[int] = self.tokens_N[start : start + self.lengths_P[index]].tolist()
        return tokens


@dataclass(frozen=True)
class TokenPairs:
    """Tokenised pairs."""

    source: TokenSide
    target: TokenSide

    def __len__(self) -> int:
        return len(self.source.lengths_P)


class PairWriter:
    """Writes tokenised pairs to files of a new folder, without holding them in memory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: list[tuple[BinaryIO, BinaryIO]] = []
        self._close = ExitStack().close

    def __enter__(self) -> PairWriter:
        self._folder.mkdir()
        with ExitStack() as opened:
            for side in _SIDES:
                paths = (_tokens_file(self._folder, side), _lengths_file(self._folder, side))
                tokens, lengths = (opened.enter_context(path.open("wb")) for path in paths)
                self._files.append((tokens, lengths))
            self._close = opened.pop_all().close
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        # All are closed, whatever the others raise; on the way out of an error, that one stays the caller's.
        if kind is None:
            self._close()
        else:
            clean_up(self._close)

    def add(self, sources: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]) -> None:
        """Append pairs of subword ids; end symbols are added."""
        for (tokens, lengths), sentences in zip(self._files, (sources, targets), strict=True):
            tokens_N, lengths_P = _flatten(sentences)
            tokens.write(tokens_N.tobytes())
            lengths.write(lengths_P.tobytes())


def open_pairs(folder: Path) -> TokenPairs:
    """Return the pairs that a PairWriter wrote. Tokens stay in a large file, and are read as they are needed."""
    return TokenPairs(*(_open_side(folder, name) for name in _SIDES))


def _open_side(folder: Path, name: str) -> TokenSide:
    path = _tokens_file(folder, name)
    is_small = path.stat().st_size <= _READ_WHOLE_BYTES
    tokens_N = np.fromfile(path, np.int32) if is_small else TokenFile(path)
    return TokenSide.from_lengths(tokens_N, np.fromfile(_lengths_file(folder, name), np.int32))


def _tokens_file(folder: Path, side: str) -> Path:
    return folder / f"{side}.tokens"


def _lengths_file(folder: Path, side: str) -> Path:
    return folder / f"{side}.lengths"


def _flatten(sentences: Sequence[Sequence[int]]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return tokens and lengths as they lie in the files."""
    flat: list[int] = []
    for tokens in sentences:
        flat.extend(tokens)
        flat.append(EOS)
    lengths_P = np.fromiter((len(tokens) + 1 for tokens in sentences), dtype=np.int32, count=len(sentences))
    return np.array(flat, dtype=np.int32), lengths_P
