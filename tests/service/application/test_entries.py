"""Texts become sentences, and their translations texts again."""

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferryman_service.application.entries import MAX_SPLIT_SENTENCES, MAX_TEXT_BYTES, Preparation, split_text
from ferryman_service.domain.errors import InvalidSentence
from ferryman_service.domain.translation import CancelToken, SearchOptions, SentenceResult, Translation
from ferryman_service.text.sentences import SentencexSplitter
from tests.fakes.translator import TIMINGS, FakeEngine

TOKEN = CancelToken()


@pytest.fixture
def engine():
    engine = FakeEngine()
    yield engine
    engine.close()


@pytest.fixture
def preparation(engine):
    return Preparation(engine=engine, options=SearchOptions(), language="en", splitter=SentencexSplitter())


def translated(engine, entry, options):
    """Translate an entry's sentences, the last first."""
    for place in reversed(range(len(entry.sentences))):
        [translation], _ = engine.translate([entry.sentences[place].text], options, TOKEN)
        last = entry.accept(place, SentenceResult(translation=translation, error=None, timings=TIMINGS))
        assert last == (place == 0)
    return entry.translation()


@pytest.mark.parametrize(
    ("text", "translation"),
    [
        ("A dog. Two cats!", "A DOG. TWO CATS!"),
        ("  A dog.   Two cats! ", "A DOG. TWO CATS!"),
        ("A dog.\nTwo cats!\n", "A DOG.\nTWO CATS!"),
        ("A dog.\n\n  Two cats!", "A DOG.\n\n  TWO CATS!"),
        ("A title\n\nA dog. Two cats!", "A TITLE\n\nA DOG. TWO CATS!"),
        ("Mr. Smith sees 3.5 dogs.", "MR. SMITH SEES 3.5 DOGS."),
        ("one", "ONE"),
        ("", ""),
        (" \n ", ""),
    ],
)
def test_a_text_keeps_its_paragraphs(engine, preparation, text, translation):
    assert translated(engine, preparation.entry(text, ""), preparation.options).hypotheses[0].text == translation


@pytest.mark.parametrize(
    ("language", "joined"),
    [("zh", "A DOG.TWO CATS!\n\nEND."), ("ja-JP", "A DOG.TWO CATS!\n\nEND."), ("th", "A DOG. TWO CATS!\n\nEND.")],
)
def test_sentences_are_joined_as_the_target_language_writes_them(engine, preparation, language, joined):
    """Thai has no space between words, but one between sentences."""
    preparation = dataclasses.replace(preparation, target_language=language)
    entry = preparation.entry("A dog. Two cats!\n\nEnd.", "")
    assert translated(engine, entry, preparation.options).hypotheses[0].text == joined


def test_a_text_with_a_sentence_for_which_nothing_was_found_is_not_finished(engine, preparation):
    entry = preparation.entry("A dog. Two cats!", "")
    [found], _ = engine.translate([entry.sentences[0].text], preparation.options, TOKEN)
    entry.accept(0, SentenceResult(translation=found, error=None, timings=TIMINGS))
    nothing = Translation(hypotheses=[], source_tokens=3)
    entry.accept(1, SentenceResult(translation=nothing, error=None, timings=TIMINGS))
    [hypothesis] = entry.translation().hypotheses
    assert (hypothesis.text, hypothesis.finished) == ("A DOG. ", False)
    assert entry.translation().source_tokens == found.source_tokens + 3


def test_counts_and_scores_are_those_of_all_sentences(engine, preparation):
    options = SearchOptions(length_penalty=0.5)
    preparation = Preparation(engine=engine, options=options, language="en", splitter=preparation.splitter)
    translation = translated(engine, preparation.entry("A dog. Two black cats.", ""), options)
    [hypothesis] = translation.hypotheses
    assert (translation.source_tokens, hypothesis.target_tokens, hypothesis.finished) == (3 + 4, 3 + 4, True)
    assert hypothesis.log_probability == pytest.approx(-0.5 * 7)
    assert hypothesis.score == pytest.approx(-0.5 * 7 / 7**0.5)


def test_each_sentence_has_the_whole_limit(preparation):
    text = "One two three four five six. " * 20
    assert len(preparation.entry(text, "").sentences) == 20


def test_a_sentence_that_is_too_long_is_named_with_its_entry(preparation):
    with pytest.raises(InvalidSentence) as caught:
        preparation.entries(["Fine.", f"Short one. {'long ' * 9}. Short. \x00"], ())
    assert [(v.field, v.reason) for v in caught.value.violations] == [
        ("sentences[1]", "SENTENCE_TOO_LONG"),
        ("sentences[1]", "CONTROL_CHARACTER"),
    ]
    assert caught.value.violations[0].description.startswith("sentence 2 of 4 has ")


def test_runs_of_marks_are_named_once_by_their_place_in_the_text(preparation):
    with pytest.raises(InvalidSentence) as caught:
        preparation.entries(["Fine.", "Fine. Bad" + "\u0301" * 20_000 + ". Bad" + "\u0301" * 20_000], ())
    [violation] = caught.value.violations
    assert (violation.field, violation.reason) == ("sentences[1]", "TOO_MANY_MARKS")
    assert "from character 10 on" in violation.description


def test_a_text_is_bounded_before_it_is_split(preparation):
    with pytest.raises(InvalidSentence) as caught:
        preparation.entries(["Fine.", "ü" * (MAX_TEXT_BYTES // 2) + "."], ())
    assert [(v.field, v.reason) for v in caught.value.violations] == [("sentences[1]", "TEXT_TOO_LONG")]


def test_twenty_violations_are_described_and_all_counted(preparation):
    with pytest.raises(InvalidSentence) as caught:
        preparation.entries(["Bad\x00. " * 300, "Fine.", "Bad\x00. " * 300], ())
    assert (len(caught.value.violations), caught.value.total) == (20, 600)


def test_the_sentences_of_a_request_are_bounded(preparation):
    half = "Yes. " * (MAX_SPLIT_SENTENCES // 2)
    preparation.entries([half, half], ())
    with pytest.raises(InvalidSentence) as caught:
        preparation.entries([half, half, "No."], ())
    assert [(v.field, v.reason) for v in caught.value.violations] == [("sentences[2]", "TOO_MANY_SENTENCES")]


class CuttingSplitter:
    """Implements ports.SentenceSplitter: cuts where it is told."""

    def __init__(self, places):
        self._places = places

    def split(self, text, language):
        places = sorted({0, len(text), *(place % (len(text) + 1) for place in self._places)})
        return [text[begin:end] for begin, end in itertools.pairwise(places)]


@given(text=st.text("ab. \n\t\u00a0\u2028\x1c\x0b", max_size=40), places=st.lists(st.integers(0, 40)))
def test_nothing_but_white_space_is_lost(text, places):
    sentences, gaps = split_text(text, "en", CuttingSplitter(places))
    assert len(gaps) == len(sentences) - 1
    assert "".join(sentences).split() == [] or all(sentence.strip("\n\t \u00a0\u2028") for sentence in sentences)
    joined = sentences[0] + "".join(gap + sentence for gap, sentence in zip(gaps, sentences[1:], strict=True))
    space = str.maketrans("", "", "\n\t \u00a0\u2028")
    assert joined.translate(space) == text.translate(space), "control characters are for the engine to find"
    assert all(gap == " " or set(gap) & set("\n\u2028") for gap in gaps)
