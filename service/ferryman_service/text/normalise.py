"""The one normalisation of sentences, the same in training and in serving."""

from __future__ import annotations

import unicodedata
from typing import Final

_ALLOWED_CONTROLS: Final = frozenset("\t\n\r")


def normalise(sentence: str) -> str:
    """Return the sentence in Unicode NFC, every run of white space one space, none at the ends.

    White space is what `str.isspace` says: no-break spaces and line breaks of every kind belong to it.
    """
    return " ".join(unicodedata.normalize("NFC", sentence).split())


def has_control_characters(sentence: str) -> bool:
    """Tell whether the sentence holds what is not text.

    That is: control characters (Unicode category Cc) other than tab, line feed and carriage return; lone surrogates
    (Cs), which UTF-8 cannot carry; noncharacters (U+FDD0..U+FDEF and the last two code points of each plane). Format
    characters (Cf), such as the joiners that many scripts need, are text.
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
