"""The one normalisation of sentences, the same in training and in serving."""

from __future__ import annotations

import re
import unicodedata
from typing import Final

from ferryman_service.domain.errors import Violation

MAX_SENTENCE_BYTES: Final = 16_384
"""The longest sentence to translate, bytes of UTF-8."""
MAX_MARKS: Final = 30
"""The longest run of combining marks, as in the Stream-Safe Text Format (UAX #15, section 13)."""

_LONGEST_PIECE: Final = 16
"""Characters of a subword, SentencePiece's max_sentencepiece_length."""
_MOST_COMPOSED: Final = 4
"""Characters of which NFC makes one, at most (UAX #15, section 6)."""
_BYTE_ORDER_MARK: Final = "\ufeff"
_BEFORE_TEXT: Final = re.compile(rf"[\s{_BYTE_ORDER_MARK}]*")
_ALLOWED_CONTROLS: Final = frozenset("\t\n\v\f\r\x85")
"""Tab and the line breaks that are control characters: white space in a sentence."""
_MAX_CHARACTER_BYTES: Final = 4
# The vowel signs of Tibetan have combining class 0, and decompose into marks that have another.
_MARKS: Final = frozenset("\u0f73\u0f75\u0f81").union(filter(unicodedata.combining, map(chr, range(0x300, 0x20000))))
_LENGTHENED: Final = frozenset(c for c in map(chr, range(0x300, 0x20000)) if len(unicodedata.normalize("NFC", c)) > 1)
"""Characters of which NFC makes several, such as U+0344: the run that they are in grows."""
# White space, what Unicode lets a reader ignore (Default_Ignorable_Code_Point: zero-width characters, joiners, fillers,
# variation selectors), and U+2581, by which SentencePiece stands for a space.
_INVISIBLE: Final = re.compile(
    "[ \u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u2581\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]*"
)


def normalise(sentence: str) -> str:
    """Return the sentence in Unicode NFC, every run of white space one space, none at the ends, and no byte order mark
    (U+FEFF) at the start.

    White space is what `str.isspace` says: no-break spaces and line breaks of every kind belong to it. A sentence of
    nothing but white space, zero-width characters and U+2581 is empty. The time is quadratic in the longest run of
    combining marks: `find_marks` must have found none that is too long.
    """
    assert find_marks(sentence) is None, "a run of marks is refused before it is sorted"
    text = " ".join(unicodedata.normalize("NFC", sentence).split())
    if _INVISIBLE.fullmatch(text):
        return ""
    return _BEFORE_TEXT.sub("", text, count=1) if text.startswith(_BYTE_ORDER_MARK) else text


def find_marks(text: str) -> int | None:
    """Return where the first run of more than MAX_MARKS combining marks begins, an index; None if there is no such run.

    A mark is a character whose canonical decomposition begins with a combining class other than 0. Runs of the text in
    NFC count too; the index is then one of NFC. The time is linear in the length of the text: every run that is too
    long covers one of the positions that are looked at.
    """
    if text.isascii():
        return None
    begin = _first_long_run(text)
    if begin is None and not _LENGTHENED.isdisjoint(text):
        return _first_long_run(unicodedata.normalize("NFC", text))
    return begin


def _first_long_run(text: str) -> int | None:
    if _MARKS.isdisjoint(text[MAX_MARKS :: MAX_MARKS + 1]):
        return None
    for middle in range(MAX_MARKS, len(text), MAX_MARKS + 1):
        if text[middle] not in _MARKS:
            continue
        begin, end = middle, middle + 1
        while begin > 0 and text[begin - 1] in _MARKS:  # at most MAX_MARKS times: a longer run was found before
            begin -= 1
        while end - begin <= MAX_MARKS and text[end : end + 1] in _MARKS:
            end += 1
        if end - begin > MAX_MARKS:
            return begin
    return None


def mark_violations(field: str, text: str) -> list[Violation]:
    """Name the first run of combining marks that is too long to be normalised, if there is one."""
    begin = find_marks(text)
    return [] if begin is None else [_marks_violation(field, begin)]


def _marks_violation(field: str, begin: int) -> Violation:
    description = (
        f"has more than {MAX_MARKS} combining marks in a row, from character {begin + 1} on: remove those that are not "
        "text"
    )
    return Violation(field=field, description=description, reason="TOO_MANY_MARKS")


def is_too_large(text: str, most_bytes: int = MAX_SENTENCE_BYTES) -> bool:
    """Tell whether the text has more bytes of UTF-8 than that."""
    if len(text) * _MAX_CHARACTER_BYTES <= most_bytes:
        return False
    return len(text) > most_bytes or len(text.encode(errors="surrogatepass")) > most_bytes


def least_subwords(text: str) -> int:
    """Return how many subwords a text has at least, the end symbol included, from its length alone: before it is
    normalised, in 4 µs for a thousand characters; 0 for an empty text. A run of characters that a vocabulary does not
    have may have fewer."""
    characters = len(text) - sum(map(text.count, " \t\n\r"))
    if not characters:
        return 0
    return -(-characters // (_LONGEST_PIECE if text.isascii() else _LONGEST_PIECE * _MOST_COMPOSED)) + 1


def size_violations(field: str, text: str, too_long: str, most_tokens: int) -> list[Violation]:
    """Name what the length alone tells of a text: more bytes than a sentence may have, or more characters than
    `most_tokens` subwords can hold, or what makes them so many: a run of marks. `too_long` is the reason. It takes
    little time."""
    cure = "shorten it" if too_long == "PREFIX_TOO_LONG" else "split the sentence, or ask for split_sentences"
    if is_too_large(text):
        description = f"has more than {MAX_SENTENCE_BYTES:,} bytes of UTF-8: {cure}"
    elif len(text) > _LONGEST_PIECE * (most_tokens - 1) and least_subwords(text) > most_tokens:
        if not text.isascii() and (begin := _first_long_run(text)) is not None:
            return [_marks_violation(field, begin)]
        description = f"has {len(text):,} characters, too many for the {most_tokens} subwords that may be: {cure}"
    else:
        return []
    return [Violation(field=field, description=description, reason=too_long)]


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
