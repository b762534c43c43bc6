"""The one normalisation of sentences, the same in training and in serving."""

from __future__ import annotations

import re
import unicodedata
from typing import Final

_MARK: Final = "\ufeff"
_BEFORE_TEXT: Final = re.compile(rf"[\s{_MARK}]*")
_ALLOWED_CONTROLS: Final = frozenset("\t\n\v\f\r\x85")
"""Tab and the line breaks that are control characters: white space in a sentence."""


def normalise(sentence: str) -> str:
    """Return the sentence in Unicode NFC, every run of white space one space, none at the ends, and no byte order mark
    (U+FEFF) at the start.

    White space is what `str.isspace` says: no-break spaces and line breaks of every kind belong to it.
    """
    return trim(" ".join(unicodedata.normalize("NFC", sentence).split()))


def trim(sentence: str) -> str:
    """Return the sentence without white space at the ends and byte order marks at the start."""
    trimmed = sentence.strip()
    return _BEFORE_TEXT.sub("", trimmed, count=1) if trimmed.startswith(_MARK) else trimmed


def has_control_characters(sentence: str) -> bool:
    """Tell whether the sentence holds what is not text.

    That is: control characters (Unicode category Cc) other than tab and line breaks (line feed, vertical tab, form
    feed, carriage return, next line); lone surrogates (Cs), which UTF-8 cannot carry; noncharacters (U+FDD0..U+FDEF and
    the last two code points of each plane). Format characters (Cf), such as the joiners that many scripts need, are
    text.
    """
    if sentence.isprintable():  # True for nearly all sentences, and excludes categories Cc, Cs and Cn
        return False
    return any(_is_control(character) for character in sentence)


def _is_control(character: str) -> bool:
    if character in _ALLOWED_CONTROLS:
        return False
    if unicodedata.category(character) in ("Cc", "Cs"):
        return True
    code_point = ord(character)
    return 0xFDD0 <= code_point <= 0xFDEF or code_point & 0xFFFE == 0xFFFE
