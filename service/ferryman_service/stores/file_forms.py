"""Recognising, by its first bytes, a file that is no text in UTF-8."""

from __future__ import annotations

import codecs
from dataclasses import dataclass
from typing import IO, Final

UTF8_MARK: Final = codecs.BOM_UTF8
_HEAD_BYTES: Final = 4096


@dataclass(frozen=True)
class FileForm:
    """What a file is (after "is"), what to do about it, and the reason of its violation."""

    name: str
    cure: str
    reason: str


def _encoded(encoding: str, why: str) -> FileForm:
    cure = f"convert it to UTF-8, as with 'iconv -f {encoding} -t UTF-8 FILE'"
    return FileForm(f"{encoding} ({why})", cure, "NOT_UTF8")


def _marked(encoding: str, mark: bytes) -> tuple[bytes, FileForm]:
    return mark, _encoded(encoding, f"it begins with the byte order mark {mark.hex(' ').upper()}")


def _compressed(name: str, cure: str, mark: bytes) -> tuple[bytes, FileForm]:
    return mark, FileForm(f"compressed with {name}", cure, "COMPRESSED")


# No text in UTF-8 begins so. The marks of UTF-32 come before those of UTF-16, which are their beginnings.
_MARKS: Final = (
    _marked("UTF-32", codecs.BOM_UTF32_LE),
    _marked("UTF-32", codecs.BOM_UTF32_BE),
    _marked("UTF-16", codecs.BOM_UTF16_LE),
    _marked("UTF-16", codecs.BOM_UTF16_BE),
    _compressed("gzip", "upload what gunzip makes of it, or let its name end in .gz", b"\x1f\x8b"),
    _compressed("zip", "upload the text that it holds", b"PK\x03\x04"),
    _compressed("xz", "upload what unxz makes of it", b"\xfd7zXZ\x00"),
    _compressed("zstd", "upload what unzstd makes of it", b"\x28\xb5\x2f\xfd"),
)


def find_form(file: IO[bytes]) -> FileForm | None:
    """Return what the file is, None if it may be UTF-8; it is at its start before and after."""
    head = file.read(_HEAD_BYTES)
    file.seek(0)
    return next((form for mark, form in _MARKS if head.startswith(mark)), None) or _form_by_zeros(head)


def _form_by_zeros(head: bytes) -> FileForm | None:
    """Recognise UTF-16 without a mark: in most scripts' text one byte in two or four is zero, always the same one."""
    even, odd = head[::2], head[1::2]
    for encoding, zeros, others in (("UTF-16LE", odd, even), ("UTF-16BE", even, odd)):
        if len(zeros) >= 8 and 4 * zeros.count(0) >= len(zeros) and others.count(0) == 0:
            return _encoded(encoding, "every other byte is zero")
    return None
