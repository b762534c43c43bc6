"""Reads the text of an upload in pieces; at most one piece is in memory."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias, cast

from ferryman._checks import LARGEST_UPLOAD_REQUEST_BYTES, raise_any
from ferryman._mapping import is_iterable, wrong
from ferryman.errors import Violation

CHUNK_BYTES: Final = 512 * 1024
"""The size of a piece: exact for files, except the last piece, and approximate for pairs."""

_PAIR_OVERHEAD_BYTES: Final = 12
"""The wire's overhead of a pair of short sentences, at most. Counting it lets even empty pairs fill a piece."""

_GZIP_MARK: Final = b"\x1f\x8b"

_REQUEST_OVERHEAD_BYTES: Final = 32
"""The wire's overhead of a request with pairs, at most."""

_LARGEST_PAIR_BYTES: Final = LARGEST_UPLOAD_REQUEST_BYTES - CHUNK_BYTES - _REQUEST_OVERHEAD_BYTES
"""A pair of this size still fits into a request whose piece is not full yet."""

SplitName: TypeAlias = Literal["train", "validation"]
SideName: TypeAlias = Literal["source", "target"]
FilePair: TypeAlias = tuple[str | os.PathLike[str], str | os.PathLike[str]]
CorpusText: TypeAlias = FilePair | Iterable[tuple[str, str]]
"""(source file, target file), each plain or .gz, one sentence a line; or (source, target) sentence pairs."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A chunk of a file (`side` is set), or some pairs (`side` is None)."""

    split: SplitName
    side: SideName | None = None
    data: bytes = b""
    pairs: tuple[tuple[str, str], ...] = ()


def read_pieces(train: CorpusText, validation: CorpusText) -> Iterator[Piece]:
    """Yield the pieces of both splits. Raises OSError for a file that is unreadable, or ends in .gz and is not gzip."""
    yield from _split_pieces("train", train)
    yield from _split_pieces("validation", validation)


def text_violations(train: object, validation: object) -> list[Violation]:
    """Return violations of the arguments' types, found without reading the texts."""
    return [*_shape_violations("train", train), *_shape_violations("validation", validation)]


def _shape_violations(split: SplitName, text: object) -> Iterator[Violation]:
    is_many = is_iterable(text) and not isinstance(text, str | bytes | os.PathLike | Mapping)
    are_paths = isinstance(text, tuple | list) and bool(text) and isinstance(text[0], str | bytes | os.PathLike)
    if not is_many or (are_paths and not _are_files(text)):
        wanted = "a tuple (source_file, target_file), or an iterable of (source, target) sentence pairs"
        yield wrong(split, text, wanted)


def _split_pieces(split: SplitName, text: CorpusText) -> Iterator[Piece]:
    if not _are_files(text):
        yield from _pair_pieces(split, cast("Iterable[tuple[str, str]]", text))
        return
    sides: tuple[SideName, SideName] = ("source", "target")
    for side, path in zip(sides, cast("FilePair", text), strict=True):
        for data in _chunks(path):
            yield Piece(split=split, side=side, data=data)


def _are_files(text: object) -> bool:
    """Whether the text is two file names, as opposed to a tuple of two pairs."""
    return isinstance(text, tuple) and len(text) == 2 and all(isinstance(part, str | os.PathLike) for part in text)


def _chunks(path: str | os.PathLike[str]) -> Iterator[bytes]:
    if not os.fspath(path).lower().endswith(".gz"):
        with open(path, "rb") as file:
            yield from iter(lambda: file.read(CHUNK_BYTES), b"")
        return
    try:
        with gzip.open(path, "rb") as unpacked:
            yield from iter(lambda: unpacked.read(CHUNK_BYTES), b"")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise gzip.BadGzipFile(f"{os.fspath(path)}: {_damage(path, error)}") from error


def _damage(path: str | os.PathLike[str], error: Exception) -> str:
    # gzip reports trailing bytes with the message for a file that is not gzip.
    with open(path, "rb") as file:
        begins_well = file.read(len(_GZIP_MARK)) == _GZIP_MARK
    if begins_well and str(error).startswith("Not a gzipped file"):
        return f"extra bytes after the compressed data ({error}); compress the text again"
    return f"truncated, damaged or not gzip ({error}); compress the text again"


def _pair_pieces(split: SplitName, pairs: Iterable[tuple[str, str]]) -> Iterator[Piece]:
    batch: list[tuple[str, str]] = []
    batch_bytes = 0
    for number, pair in enumerate(pairs):
        source, target, size = _checked_pair(f"{split}[{number}]", pair)
        batch.append((source, target))
        batch_bytes += size
        if batch_bytes >= CHUNK_BYTES:
            yield Piece(split=split, pairs=tuple(batch))
            batch, batch_bytes = [], 0
    if batch:
        yield Piece(split=split, pairs=tuple(batch))


def _checked_pair(field: str, pair: Any) -> tuple[str, str, int]:  # noqa: ANN401 (it is what is checked)
    """Return source, target and their size in a request. Raises InvalidRequest unless it is a pair of UTF-8 texts."""
    try:
        source, target = pair
        if isinstance(pair, str):
            raise TypeError
        size = len(source.encode()) + len(target.encode()) + _PAIR_OVERHEAD_BYTES
    except (TypeError, ValueError, AttributeError):
        raise_any([wrong(field, pair, "a (source, target) pair of UTF-8 texts")])
        raise
    if size > _LARGEST_PAIR_BYTES:
        text = f"has {size:,} bytes, a pair may have {_LARGEST_PAIR_BYTES:,}; split it into sentences"
        raise_any([Violation(field=field, description=text, reason="REQUEST_TOO_LARGE")])
    return source, target, size
