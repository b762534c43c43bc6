"""The lines of a text stream, one of which may be no text: it spoils none of the others."""

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
"""A longer line is an error of its own: no model takes it, and a file without line breaks is not held in memory."""

_CHUNK_BYTES: Final = 1 << 16

Read = Callable[[int], bytes]
"""At most so many bytes of a stream, as soon as there are some; none at its end. Raises OSError."""


@dataclass(frozen=True)
class Line:
    """A line without its line break. `problem` says why it is no text, else it is empty."""

    text: str
    problem: str = ""


def standard_input() -> Read:
    """Return how standard input is read. Raises OSError if it is closed.

    The descriptor is read itself. A thread that waits in sys.stdin holds that object's lock, and Python aborts if the
    process ends meanwhile.
    """
    if sys.stdin is None:
        raise OSError(errno.EBADF, "closed; give the sentences as arguments or redirect a file", "standard input")
    try:
        descriptor = sys.stdin.fileno()
    except io.UnsupportedOperation:  # an object in its place, without a descriptor
        return sys.stdin.buffer.read
    return lambda size: _read(descriptor, size)


def _read(descriptor: int, size: int) -> bytes:
    while True:
        try:
            return os.read(descriptor, size)
        except BlockingIOError:  # whoever shares the descriptor may have set O_NONBLOCK
            select.select([descriptor], [], [])
        except OSError as error:
            raise OSError(error.errno, error.strerror, "standard input") from error


def read_lines(read: Read) -> Iterator[Line]:
    """Yield each line as soon as it is complete. A byte-order mark at the start is no text. Raises OSError.

    Lines end with LF or CR LF, the last one may also end with the stream. Of a line that is longer than MAX_LINE_BYTES
    little more is held.
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
        *ends, rest = chunk.split(b"\n")
        for end in ends:
            parts.append(end)
            yield b"".join(parts), size + len(end)
            parts, size = [], 0
        size += len(rest)
        if rest and size <= MAX_LINE_BYTES + _CHUNK_BYTES:
            parts.append(rest)
    if size:
        yield b"".join(parts), size


def _decode(data: bytes, size: int) -> Line:
    if size > MAX_LINE_BYTES:
        shown = data[:80].decode(errors="replace")
        return Line(f"{shown}…", f"has {size:,} bytes, at most {MAX_LINE_BYTES:,} are allowed: split the line")
    try:
        return Line(data.decode())
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8: {error.reason} (byte {error.start + 1}); convert the text, for instance with iconv"
        return Line(data.decode(errors="replace"), problem)
