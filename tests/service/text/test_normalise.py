import re
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferryman_service.text.normalise import (
    MAX_MARKS,
    MAX_SENTENCE_BYTES,
    find_marks,
    has_control_characters,
    is_too_large,
    normalise,
)


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("  Ein  Hund \n", "Ein Hund"),
        ("1\u00a0000\u202f000 km", "1 000 000 km"),
        ("eins\u2028zwei\x85drei\tvier\r\nfünf", "eins zwei drei vier fünf"),
        ("cafe\u0301", "caf\u00e9"),
        ("\u3000", ""),
        ("\ufeffEin Hund", "Ein Hund"),
        (" \ufeff \ufeff\u00a0Ein\ufeff Hund", "Ein\ufeff Hund"),  # inside it is a format character
        ("\ufeff", ""),
        ("\u2581 \u2581", ""),
        ("\ufeff\u200b \u200d\ufe0f", ""),
        ("\u2581a\u200bb", "\u2581a\u200bb"),
        ("", ""),
        ("ﬁx ½", "ﬁx ½"),  # NFC, not NFKC: compatibility characters stay
    ],
)
def test_normalise_composes_characters_and_collapses_white_space(raw, clean):
    assert normalise(raw) == clean


@given(st.text())
def test_normalising_twice_changes_nothing_more(text):
    assert normalise(normalise(text)) == normalise(text)


@pytest.mark.parametrize(
    "text", ["a\x00b", "bell\x07", "\x1b[31m", "a\x7fb", "\x9f", "\ud800", "\ufffe", "\U0001ffff", "\ufdd0"]
)
def test_control_characters_are_seen(text):
    assert has_control_characters(text)


@pytest.mark.parametrize(
    "text",
    [
        "plain",
        "tab\tline\nreturn\r\v\f\x85\u2028",
        "no\u00a0break",
        "نص\u200cعربي",
        "👩\u200d🔬",
        "\ufeff",
        "",
    ],
)
def test_text_is_not_a_control_character(text):
    assert not has_control_characters(text)


def is_mark(character):
    return unicodedata.combining(unicodedata.normalize("NFD", character)[0]) != 0


def test_allowed_text_stays_allowed_after_normalising():
    for lengthened in ("\u0344", "\u0958"):  # NFC makes two characters of each
        for count in range(1, MAX_MARKS + 1):
            text = "a" + lengthened * count + "\u0301" * (MAX_MARKS - count)
            if find_marks(text) is None:
                assert find_marks(normalise(text)) is None
    assert find_marks("a" + "\u0344" * 16) is not None
    assert find_marks("a" + "\u0344" * 15) is None


def test_every_mark_of_unicode_counts():
    for character in filter(is_mark, map(chr, range(sys.maxunicode + 1))):
        assert find_marks("ab" + character * 31) == 2
        longer = max(1, sum(map(is_mark, unicodedata.normalize("NFC", character))))
        assert find_marks("ab" + character * (30 // longer)) is None


@given(st.text(alphabet="ab\u0301", max_size=5), st.lists(st.tuples(st.integers(1, 40), st.sampled_from("ab\u4e2d"))))
def test_first_long_run_of_marks_is_found(head, runs):
    text = head + "".join("\u0301\u0323"[count % 2] * count + letter for count, letter in runs)
    found = re.search("[\u0301\u0323]{31}", text)
    assert find_marks(text) == (found.start() if found else None)


class CountingText(str):
    """A text that counts the characters that are looked at one by one."""

    looked_at = 0

    def __getitem__(self, place):
        CountingText.looked_at += 1
        return super().__getitem__(place)


@pytest.mark.parametrize(
    "text",
    ["a" * 40 + "\u0301" * 100_000, ("a" + "\u0301" * 30) * 4000, "\u0301 " * 50_000, "中" * 100_000],
    ids=["one run", "runs as long as allowed", "every other", "none"],
)
def test_looking_for_marks_takes_linear_time(text):
    CountingText.looked_at = 0
    find_marks(CountingText(text))
    assert CountingText.looked_at <= 2 * len(text)


def test_too_long_run_of_marks_is_never_normalised():
    assert len(normalise("a" + "\u0301" * MAX_MARKS)) == MAX_MARKS
    with pytest.raises(AssertionError):
        normalise("a" + "\u0301" * (MAX_MARKS + 1))


@pytest.mark.parametrize("character", ["a", "ß", "中", "\U0001f600", "\ud800"])
def test_the_size_of_a_sentence_is_that_of_its_utf8(character):
    size = len(character.encode(errors="surrogatepass"))
    most = MAX_SENTENCE_BYTES // size
    assert not is_too_large(character * most)
    assert is_too_large(character * (most + 1))
