"""Sentences of texts, in many languages, and of anything at all."""

import subprocess
import sys

import pytest
import sentencex
from hypothesis import given, settings
from hypothesis import strategies as st

from ferryman_service.text.sentences import SentencexSplitter


@pytest.mark.parametrize(
    ("language", "text", "count"),
    [
        ("en", "Dr. Smith went to Washington. He arrived at 3.15 p.m. on Jan. 5th! Was he late?", 3),
        ("de", "Das ist z. B. ein Satz. Noch einer am 3. Mai.", 2),
        ("de-AT", "Das ist z. B. ein Satz. Noch einer am 3. Mai.", 2),
        ("zh", "你好。再见！", 2),
        ("hi", "यह एक वाक्य है। दूसरा।", 2),
        ("xx", "Mi ne scias. Ĉu vi?", 2),
        ("en", "no end", 1),
        ("en", "", 0),
    ],
)
def test_sentences(language, text, count):
    pieces = SentencexSplitter().split(text, language)
    assert len(pieces) == count
    assert "".join(pieces) == text


LANGUAGES = ["en", "de", "fr", "ja", "hi", "kk", "am", "qq-Latn-XX", ""]
PARTS = [
    "a",
    "A",
    "Dr.",
    ".",
    "!",
    " ",
    "\n",
    "\u00a0",
    "\u2028",
    "\u3000",
    "\x85",
    "。",
    "...",
    "1.",
    "(a)",
    "“",
    "😀",
    "ß",
]


@settings(max_examples=150)
@given(parts=st.lists(st.sampled_from(PARTS)), language=st.sampled_from(LANGUAGES))
def test_the_pieces_are_the_text(parts, language):
    """Without the detour over white space of one byte the library panics at some of these."""
    text = "".join(parts)
    assert "".join(SentencexSplitter().split(text, language)) == text


@pytest.mark.parametrize("space", ["\u00a0", "\u2028", "\u3000", "\x85"])
def test_white_space_that_the_library_panics_at(space):
    assert len(SentencexSplitter().split(f"Say A{space}. Now! Well?", "en")) == 3


def test_long_text_is_cut_in_windows(monkeypatch):
    """The library's time is quadratic in the length of a text without spaces, and it loses line breaks of long ones."""
    seen = []
    segment = sentencex.segment
    monkeypatch.setattr(sentencex, "segment", lambda language, text: seen.append(len(text)) or segment(language, text))
    for text, count in (
        ("中文句子。" * 6000, 6000),
        ("One “A. B.” two.\n\n" * 1500, None),
        ("a" + "\n" * 12_000, None),
        ("\n" * 10_241, None),
    ):
        pieces = SentencexSplitter().split(text, "zh")
        assert "".join(pieces) == text
        assert count in (None, len(pieces))
        assert max(seen) <= 8192
        assert sum(seen) < 3 * len(text), "a portion of each window is looked at again"
        seen.clear()


def test_windows_cut_as_the_library_does():
    text = "Dr. Smith left. He came at 3.15 p.m. on Jan. 5th! Yes (he. was). “Quoted. Text.” End. " * 100
    assert SentencexSplitter().split(text, "en") == list(sentencex.segment("en", text))


def test_sentence_longer_than_every_window_is_cut():
    pieces = SentencexSplitter().split("a" * 20_000 + ". End.", "en")
    assert [len(piece) for piece in pieces] == [8192, 8192, 3618, 4]


def test_a_panic_of_the_library_leaves_the_text_whole(monkeypatch):
    class PanicException(BaseException):
        pass

    def segment(language, text):
        raise PanicException("not a char boundary")

    monkeypatch.setattr(sentencex, "segment", segment)
    assert SentencexSplitter().split("One. Two.", "en") == ["One. Two."]


def test_library_is_loaded_only_for_splitting():
    code = "import sys, ferryman_service.bootstrap as b; assert 'sentencex' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
