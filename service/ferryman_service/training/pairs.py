"""Tokenised sentence pairs as flat arrays, which may lie in files.

Shape suffixes: P pairs, N tokens of all pairs of one side, B sentences, L positions of the longest of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from ferryman_service.domain.tokens import EOS, PAD

_SIDES: Final = ("source", "target")


@dataclass(frozen=True)
class TokenSide:
    """One side of the pairs: sentence p is tokens_N[starts_P[p] : starts_P[p] + lengths_P[p]], end symbol included."""

    tokens_N: NDArray[np.int32]
    starts_P: NDArray[np.int64]
    lengths_P: NDArray[np.int64]

    @classmethod
    def from_lengths(cls, tokens_N: NDArray[np.int32], lengths_P: NDArray[np.int64]) -> TokenSide:
        """Return the side whose sentences follow one another without a gap."""
        assert lengths_P.sum() == len(tokens_N)
        return cls(tokens_N, np.cumsum(lengths_P) - lengths_P, lengths_P)

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
        tokens_BL[real_BL] = self.tokens_N[(self.starts_P[index_B, None] + position_L)[real_BL]]
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
        self._files: list[BinaryIO] = []
        self._lengths: tuple[list[NDArray[np.int64]], ...] = ([], [])

    def __enter__(self) -> PairWriter:
        self._folder.mkdir()
        self._files = [(self._folder / f"{side}.tokens").open("wb") for side in _SIDES]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files:
            file.close()
        if kind is None:
            for name, parts in zip(_SIDES, self._lengths, strict=True):
                lengths_P = np.concatenate(parts) if parts else np.zeros(0, np.int64)
                np.save(self._folder / f"{name}.lengths.npy", lengths_P, allow_pickle=False)

    def add(self, sources: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]) -> None:
        """Append pairs of subword ids; end symbols are added."""
        for file, parts, sentences in zip(self._files, self._lengths, (sources, targets), strict=True):
            tokens_N, lengths_P = _flatten(sentences)
            file.write(tokens_N.tobytes())
            parts.append(lengths_P)


def open_pairs(folder: Path) -> TokenPairs:
    """Return the pairs that a PairWriter wrote; tokens stay in the file and are read as they are needed."""
    return TokenPairs(*(_open_side(folder, name) for name in _SIDES))


def _open_side(folder: Path, name: str) -> TokenSide:
    lengths_P = np.load(folder / f"{name}.lengths.npy", allow_pickle=False)
    path = folder / f"{name}.tokens"
    tokens_N = np.asarray(np.memmap(path, dtype=np.int32, mode="r")) if len(lengths_P) else np.zeros(0, np.int32)
    return TokenSide.from_lengths(tokens_N, lengths_P)


def _flatten(sentences: Sequence[Sequence[int]]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    flat: list[int] = []
    for tokens in sentences:
        flat.extend(tokens)
        flat.append(EOS)
    lengths_P = np.fromiter((len(tokens) + 1 for tokens in sentences), dtype=np.int64, count=len(sentences))
    return np.array(flat, dtype=np.int32), lengths_P
