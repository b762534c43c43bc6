import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferryman_service.text.normalise import has_control_characters, normalise


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("  Ein  Hund \n", "Ein Hund"),
        ("1\u00a0000\u202f000 km", "1 000 000 km"),
        ("eins\u2028zwei\x85drei\tvier\r\nfünf", "eins zwei drei vier fünf"),
        ("cafe\u0301", "caf\u00e9"),
        ("\u3000", ""),
        ("\u2581 \u2581", ""),
        ("\ufeff\u200b \u200d\ufe0f", ""),
        ("\u2581a\u200bb", "\u2581a\u200bb"),
        ("", ""),
        ("ﬁx ½", "ﬁx ½"),  # NFC, not NFKC: compatibility characters stay
    ],
)
def test_it_composes_and_collapses_white_space(raw, clean):
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
    "text", ["plain", "tab\tline\nreturn\r", "no\u00a0break", "نص\u200cعربي", "👩\u200d🔬", "\ufeff", ""]
)
def test_text_is_not_a_control_character(text):
    assert not has_control_characters(text)
