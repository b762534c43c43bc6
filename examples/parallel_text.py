"""Reads parallel text from `prefix.en` and `prefix.de`, plain or .gz: UTF-8, one sentence a line. A byte-order mark at
the start of a file is ignored."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


class TextMissing(Exception):
    """A file is missing or not UTF-8, or the two files have different line counts."""


@dataclass(frozen=True)
class ParallelFiles:
    """The source and the target file of a split."""

    source: Path
    target: Path


@dataclass(frozen=True)
class ParallelLines:
    """The sentences of a split: the same number on both sides."""

    source: Sequence[str]
    target: Sequence[str]


def find_files(prefix: str, source_language: str, target_language: str) -> ParallelFiles:
    """Return the files of a prefix. Raises TextMissing with both candidates."""
    return ParallelFiles(source=_find(prefix, source_language), target=_find(prefix, target_language))


def read_lines(files: ParallelFiles) -> ParallelLines:
    """Read both files. Raises TextMissing if line counts differ or a file is not UTF-8."""
    source, target = _read(files.source), _read(files.target)
    if len(source) != len(target):
        raise TextMissing(f"{files.source} has {len(source)} lines, but {files.target} has {len(target)}")
    return ParallelLines(source=source, target=target)


def _find(prefix: str, language: str) -> Path:
    plain = Path(f"{prefix}.{language}")
    compressed = Path(f"{prefix}.{language}.gz")
    for path in (plain, compressed):
        if path.is_file():
            return path
    raise TextMissing(f"neither {plain} nor {compressed} is a file")


def _read(path: Path) -> Sequence[str]:
    data = path.read_bytes()
    try:
        # Not str.splitlines, which also splits at characters such as U+2028.
        lines = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise TextMissing(f"{path} is not UTF-8: {error}") from error
    if lines[-1] == "":
        lines.pop()
    return [line.removesuffix("\r") for line in lines]
