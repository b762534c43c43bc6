"""The one normalisation of sentences, the same in training and in serving."""

from __future__ import annotations

import re
import unicodedata
from typing import Final

_ALLOWED_CONTROLS: Final = frozenset("\t\n\r")
# White space, what Unicode lets a reader ignore (Default_Ignorable_Code_Point: zero-width characters, joiners, fillers,
# variation selectors), and U+2581, by which SentencePiece stands for a space.
_INVISIBLE: Final = re.compile(
    "[ \u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u2581\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]*"
)


def normalise(sentence: str) -> str:
    """Return the sentence in Unicode NFC, every run of white space one space, none at the ends.

    White space is what `str.isspace` says: no-break spaces and line breaks of every kind belong to it. A sentence of
    nothing but white space, zero-width characters and U+2581 is empty.
    """
    text = " ".join(unicodedata.normalize("NFC", sentence).split())
    return "" if _INVISIBLE.fullmatch(text) else text


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
