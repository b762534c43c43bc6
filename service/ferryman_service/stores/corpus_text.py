"""Checking and normalising the text of a corpus, line by line, without ever holding it.

A line ends with "\\n" or "\\r\\n"; in a file without any "\\n", with "\\r". Other characters that Unicode counts as
line ends are white space of the sentence. Stored text has no byte order mark, and every line ends with "\\n". The rest
is kept as it came.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import IO, Final

from ferryman_service.domain.corpora import SAMPLES, SentencePair, Side, Split, SplitStatistics
from ferryman_service.domain.errors import Violation
from ferryman_service.stores.corpus_signs import CorpusSigns, SplitSigns
from ferryman_service.stores.file_forms import UTF8_MARK, FileForm, find_form
from ferryman_service.text.normalise import MAX_MARKS, find_marks

_BLOCK_BYTES: Final = 1 << 16


@dataclass(frozen=True, kw_only=True)
class CorpusLimits:
    """What an upload may hold. `max_violations` bounds what one InvalidCorpus names."""

    max_bytes: int = 4 << 30
    max_line_bytes: int = 65_536
    max_violations: int = 20

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value < 1:
                raise ValueError(f"{field.name} is {value}, must be at least 1")


@dataclass(frozen=True, kw_only=True)
class CheckedSplit:
    """A split as it will be stored: what it holds, the SHA-256 of source and target, what is wrong with it as a whole,
    and with lines of source and target: the first of them, and how many there are."""

    statistics: SplitStatistics
    digests: tuple[str, str]
    split_violations: tuple[Violation, ...]
    line_violations: tuple[Sequence[Violation], Sequence[Violation]]
    bad_lines: int


def check_split(
    split: Split, raw_dir: Path, checked_dir: Path, limits: CorpusLimits, signs: CorpusSigns | None = None
) -> CheckedSplit:
    """Read "<split>.source" and "<split>.target" in `raw_dir` (a missing file is an empty one) and write the normalised
    files, fsynced, under the same names into `checked_dir`. `signs` is told every pair with text."""
    sides = []
    for side in Side:
        name = f"{split}.{side}"
        (raw_dir / name).touch()
        sides.append(_TextFile(name, raw_dir / name, checked_dir / name, limits))
    source, target = sides
    of_split = SplitSigns(split, signs)
    with closing(source.lines()) as source_lines, closing(target.lines()) as target_lines:
        statistics = _count(source_lines, target_lines, of_split)
    return CheckedSplit(
        statistics=dataclasses.replace(statistics, warnings=tuple(of_split.warnings())),
        digests=(source.sha256.hexdigest(), target.sha256.hexdigest()),
        split_violations=tuple(_split_violations(split, statistics, source, target)),
        line_violations=(source.violations, target.violations),
        bad_lines=source.bad_lines + target.bad_lines,
    )


class _TextFile:
    """One file on its way from raw to checked; `field` is its name in violations."""

    def __init__(self, field: str, raw: Path, checked: Path, limits: CorpusLimits) -> None:
        self.field = field
        self.line_count = 0
        self.sha256 = hashlib.sha256()
        self.violations: list[Violation] = []
        self.form: FileForm | None = None
        """What the file is, if it is no text in UTF-8: then no line of it is read."""
        self.bad_lines = 0
        self._raw = raw
        self._checked = checked
        self._max_line_bytes = limits.max_line_bytes
        self._max_violations = limits.max_violations

    def lines(self) -> Generator[str, None, None]:
        """Yield the lines without their ends, after writing each; a bad line is noted and yielded as well as may be."""
        with self._raw.open("rb") as raw, self._checked.open("wb") as checked:
            self.form = find_form(raw)
            if self.form is not None:
                self._note(f"is {self.form.name}; {self.form.cure}", self.form.reason)
                return
            file: IO[bytes] = raw if _holds_line_feed(raw) else io.BufferedReader(_ByCarriageReturn(raw), _BLOCK_BYTES)
            offset_bytes = len(UTF8_MARK) if file.read(len(UTF8_MARK)) == UTF8_MARK else 0
            file.seek(offset_bytes)
            while line := file.readline(self._max_line_bytes + len(b"\r\n")):
                self.line_count += 1
                text = self._check(line, offset_bytes)
                stored = text.encode() + b"\n"
                self.sha256.update(stored)
                checked.write(stored)
                offset_bytes += len(line)
                if not line.endswith(b"\n"):
                    offset_bytes += _skip_line(file)
                yield text
            checked.flush()
            os.fsync(checked.fileno())

    def _check(self, line: bytes, offset_bytes: int) -> str:
        content = line.removesuffix(b"\n").removesuffix(b"\r")
        if len(content) > self._max_line_bytes:
            self._note(f"line {self.line_count} is longer than {self._max_line_bytes} bytes: split it", "LINE_TOO_LONG")
            return content.decode(errors="replace")
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            place = f"line {self.line_count}, byte {offset_bytes + error.start} of the file"
            self._note(f"{place}: not UTF-8 ({error.reason}): convert the file to UTF-8", "NOT_UTF8")
            return content.decode(errors="replace")
        if (begin := find_marks(text)) is not None:
            place = f"line {self.line_count}, from character {begin + 1} on"
            self._note(f"{place}: more than {MAX_MARKS} combining marks in a row: remove them", "TOO_MANY_MARKS")
        return text

    def _note(self, description: str, reason: str) -> None:
        self.bad_lines += 1
        if len(self.violations) < self._max_violations:
            self.violations.append(Violation(field=self.field, description=description, reason=reason))


class _ByCarriageReturn(io.RawIOBase):
    """A file read with a line feed for every carriage return."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw

    def readable(self) -> bool:
        """Say that it can be read."""
        return True

    def seekable(self) -> bool:
        """Say that it can be sought."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a place."""
        return self._raw.seek(offset, whence)

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # Buffer, before Python 3.12
        """Fill the buffer; return how many bytes that were."""
        data = self._raw.read(len(buffer)).replace(b"\r", b"\n")
        buffer[: len(data)] = data
        return len(data)


def _holds_line_feed(file: IO[bytes]) -> bool:
    """Tell whether the file has any; it is at its start before and after."""
    found = any(b"\n" in block for block in iter(lambda: file.read(_BLOCK_BYTES), b""))
    file.seek(0)
    return found


def _skip_line(file: IO[bytes]) -> int:
    """Read to the end of the line; return how many bytes that was."""
    size_bytes = 0
    while piece := file.readline(_BLOCK_BYTES):
        size_bytes += len(piece)
        if piece.endswith(b"\n"):
            break
    return size_bytes


def _count(source: Iterator[str], target: Iterator[str], signs: SplitSigns) -> SplitStatistics:
    pairs = source_words = target_words = empty_pairs = 0
    samples: list[SentencePair] = []
    for source_text, target_text in zip_longest(source, target, fillvalue=""):
        pairs += 1
        source_length, target_length = len(source_text.split()), len(target_text.split())
        source_words += source_length
        target_words += target_length
        if source_length == 0 or target_length == 0:
            empty_pairs += 1
            continue
        signs.add(source_text, target_text)
        if len(samples) < SAMPLES:
            samples.append(SentencePair(source=source_text, target=target_text).shortened())
    return SplitStatistics(
        pairs=pairs,
        source_words=source_words,
        target_words=target_words,
        empty_pairs=empty_pairs,
        samples=tuple(samples),
    )


def _split_violations(
    split: Split, statistics: SplitStatistics, source: _TextFile, target: _TextFile
) -> Iterator[Violation]:
    if source.form is not None or target.form is not None:
        return
    if source.line_count != target.line_count:
        text = f"has {target.line_count} lines, {source.field} has {source.line_count}: line n must translate line n"
        yield Violation(field=target.field, description=text, reason="LINE_COUNT_MISMATCH")
    elif statistics.pairs == statistics.empty_pairs:
        text = f"has no pair with text on both sides, among {statistics.pairs}: at least one is needed"
        yield Violation(field=split.value, description=text, reason="EMPTY")
