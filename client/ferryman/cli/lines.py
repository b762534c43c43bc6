"""Reads lines of UTF-8 from a byte stream; a line that is not UTF-8 does not affect the others."""

from __future__ import annotations

import codecs
import errno
import io
import os
import select
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

MAX_LINE_BYTES: Final = 1 << 20
"""A longer line is an error. No model accepts it, and a file without line breaks must not fill the memory."""

_CHUNK_BYTES: Final = 1 << 16

Read = Callable[[int], bytes]
"""Returns up to this many bytes as soon as some are available, and none at the end of the stream. Raises OSError."""


@dataclass(frozen=True)
class Line:
    """A line without its line break. `problem` says why it is not text; it is empty for text."""

    text: str
    problem: str = ""


def standard_input() -> Read:
    """Return a function that reads standard input. Raises OSError if it is closed.

    It reads the descriptor, because a thread that blocks in sys.stdin holds a lock, and Python aborts if the process
    ends meanwhile.
    """
    if sys.stdin is None:
        raise OSError(errno.EBADF, "closed; pass the sentences as arguments or redirect a file", "standard input")
    try:
        descriptor = sys.stdin.fileno()
    except io.UnsupportedOperation:  # replaced by an object without a descriptor
        return sys.stdin.buffer.read
    return lambda size: _read(descriptor, size)


def _read(descriptor: int, size: int) -> bytes:
    while True:
        try:
            return os.read(descriptor, size)
        except BlockingIOError:  # another process may have set O_NONBLOCK on the descriptor
            select.select([descriptor], [], [])
        except OSError as error:
            raise OSError(error.errno, error.strerror, "standard input") from error


def read_lines(read: Read) -> Iterator[Line]:
    """Yield each line as soon as it is complete, without a byte-order mark at the start. Raises OSError.

    Lines end with LF or CR LF, the last one also with the stream. A line longer than MAX_LINE_BYTES is truncated.
    """
    beginning = True
    for data, size in _raw_lines(read):
        if beginning:
            data, beginning = data.removeprefix(codecs.BOM_UTF8), False
        yield _decode(data.removesuffix(b"\r"), size)


def _raw_lines(read: Read) -> Iterator[tuple[bytes, int]]:
    """Yield the first MAX_LINE_BYTES of each line, and its size."""
    parts: list[bytes] = []
    size = 0
    while chunk := read(_CHUNK_BYTES):
        *ends, remainder = chunk.split(b"\n")
        for end in ends:
            parts.append(end)
            yield b"".join(parts), size + len(end)
            parts, size = [], 0
        size += len(remainder)
        if remainder and size <= MAX_LINE_BYTES + _CHUNK_BYTES:
            parts.append(remainder)
    if size:
        yield b"".join(parts), size


def _decode(data: bytes, size: int) -> Line:
    if size > MAX_LINE_BYTES:
        shown = data[:80].decode(errors="replace")
        return Line(f"{shown}…", f"has {size:,} bytes, at most {MAX_LINE_BYTES:,} are allowed; split the line")
    try:
        return Line(data.decode())
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8: {error.reason} (byte {error.start + 1}); convert it to UTF-8, such as with iconv"
        return Line(data.decode(errors="replace"), problem)
