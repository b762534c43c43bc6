"""From text to what a model takes and back: every violation at once, every bound of a translation's length."""

import pytest

from ferryman_service.domain.errors import InvalidSentence
from ferryman_service.domain.tokens import EOS
from ferryman_service.domain.translation import Hypothesis, PreparedSentence, SearchOptions
from ferryman_service.pipeline.text import SentenceText
from ferryman_service.search.sentence import RawHypothesis
from ferryman_service.text.normalise import least_subwords

MAX_SENTENCE_TOKENS = 30
LONG = " ".join(["one two three four"] * 20)
PLAIN = SearchOptions()


@pytest.fixture
def text(subwords):
    return SentenceText(subwords, MAX_SENTENCE_TOKENS)


def violations(call, *arguments):
    with pytest.raises(InvalidSentence) as caught:
        call(*arguments)
    return [(violation.field, violation.reason) for violation in caught.value.violations]


def test_a_sentence_is_normalised_split_and_ended(text, subwords):
    found = text.prepare(" one \t two\n", "", PLAIN)
    assert found.source == (*subwords.encode(["one two"])[0], EOS)
    assert found.prefix == ()
    assert found.text_ns > 0


@pytest.mark.parametrize("empty", ["", " ", "\t\n", "\u00a0", "\u2581\u2581", "\u200b \ufeff"])
def test_an_empty_sentence_has_no_tokens(text, empty):
    assert text.prepare(empty, "", PLAIN).source == ()


def test_many_are_prepared_as_each(text):
    sentences, prefixes = ["one", "", "two three"], ["", "two", "four five"]
    found = text.prepare_all(sentences, prefixes, PLAIN)
    each = [text.prepare(*pair, PLAIN) for pair in zip(sentences, prefixes, strict=True)]
    assert [(one.source, one.prefix, one.max_length) for one in found] == [
        (one.source, one.prefix, one.max_length) for one in each
    ]
    assert text.prepare_all([], (), PLAIN) == []
    assert [one.prefix for one in text.prepare_all(sentences, (), PLAIN)] == [(), (), ()]


def test_every_violation_of_a_sentence_is_named_under_its_field(text):
    found = violations(text.prepare, LONG + "\x07", LONG + "\x00", SearchOptions(max_length=9))
    assert sorted(found) == [
        ("prefix", "CONTROL_CHARACTER"),
        ("prefix", "PREFIX_TOO_LONG"),
        ("sentence", "CONTROL_CHARACTER"),
        ("sentence", "SENTENCE_TOO_LONG"),
    ]


def test_every_violation_of_many_is_named_under_its_field(text):
    sentences = ["fine", LONG, "bad\x00", "fine", LONG + "\x7f"]
    prefixes = ["", "", "\x01", LONG, ""]
    found = violations(text.prepare_all, sentences, prefixes, PLAIN)
    assert sorted(found) == [
        ("sentences[1]", "SENTENCE_TOO_LONG"),
        ("sentences[2]", "CONTROL_CHARACTER"),
        ("sentences[4]", "CONTROL_CHARACTER"),
        ("sentences[4]", "SENTENCE_TOO_LONG"),
        ("target_prefixes[2]", "CONTROL_CHARACTER"),
        ("target_prefixes[3]", "PREFIX_TOO_LONG"),
    ]


def test_text_that_is_slow_to_normalise_is_refused_first(text):
    """The time of normalisation is quadratic in a run of marks, and `normalise` asserts that there is none too long."""
    marks = "e" + "\u0301" * 100_000
    found = violations(text.prepare_all, ["fine", marks, "two " + "\u0301" * 31, "x" * 65_537], ["", marks] * 2, PLAIN)
    assert sorted(found) == [
        ("sentences[1]", "SENTENCE_TOO_LONG"),
        ("sentences[2]", "TOO_MANY_MARKS"),
        ("sentences[3]", "SENTENCE_TOO_LONG"),
        ("target_prefixes[1]", "PREFIX_TOO_LONG"),
        ("target_prefixes[3]", "PREFIX_TOO_LONG"),
    ]
    with pytest.raises(InvalidSentence) as caught:
        text.prepare("one two" + "\u0301" * 31, "", PLAIN)
    [violation] = caught.value.violations
    assert "more than 30 combining marks in a row, from character 8 on: remove" in violation.description


@pytest.mark.parametrize("prefix", ["«one»", "one ⁇ two", "one\u2581two", "one (two"])
def test_prefix_that_would_not_come_back_is_refused(text, prefix):
    with pytest.raises(InvalidSentence) as caught:
        text.prepare("one", prefix, SearchOptions(max_length=25))
    [violation] = caught.value.violations
    assert (violation.field, violation.reason) == ("prefix", "UNKNOWN_CHARACTER")
    for character in set(prefix) - set("one two"):
        assert f"{character!r} (U+{ord(character):04X})" in violation.description
    assert "'o'" not in violation.description


def test_prefix_comes_back_as_it_is(text, subwords):
    prepared = text.prepare("one", " six\u00a0seven ten", SearchOptions(max_length=25))
    assert subwords.decode(prepared.prefix) == "six seven ten"


def test_a_violation_says_how_long_and_what_to_do(text, subwords):
    with pytest.raises(InvalidSentence) as caught:
        text.prepare(LONG, "", PLAIN)
    [violation] = caught.value.violations
    tokens = len(subwords.encode([LONG])[0]) + 1
    assert f"has {tokens} subwords" in violation.description
    assert "at most 30" in violation.description
    assert "split_sentences" in violation.description


def test_the_longest_sentence_counts_its_end_symbol(subwords):
    [tokens] = subwords.encode(["one two three"])
    SentenceText(subwords, len(tokens) + 1).prepare("one two three", "", PLAIN)
    short = SentenceText(subwords, len(tokens))
    assert violations(short.prepare, "one two three", "", PLAIN) == [("sentence", "SENTENCE_TOO_LONG")]


def test_the_longest_prefix_leaves_room_for_the_end_symbol(text, subwords):
    prefix = "one two three"
    tokens = len(subwords.encode([prefix])[0])
    found = text.prepare("one", prefix, SearchOptions(max_length=tokens + 1))
    assert found.prefix == tuple(subwords.encode([prefix])[0])
    options = SearchOptions(max_length=tokens)
    assert violations(text.prepare, "one", prefix, options) == [("prefix", "PREFIX_TOO_LONG")]


@pytest.mark.parametrize(
    ("options", "bounds"),
    [
        ({}, (0, 18)),  # twice the source's 4 and 10
        ({"max_length": 5}, (0, 5)),
        ({"max_length": 4096}, (0, MAX_SENTENCE_TOKENS)),  # the model's limit counts
        ({"max_length_ratio": 1.5}, (0, 6)),
        ({"max_length_ratio": 1.3}, (0, 6)),  # 5.2, rounded up
        ({"max_length_ratio": 100.0}, (0, 18)),
        ({"max_length_ratio": 0.001}, (0, 1)),
        ({"max_length": 5, "max_length_ratio": 1.0}, (0, 4)),
        ({"min_length": 3}, (3, 18)),
        ({"min_length": 17}, (17, 18)),
        ({"min_length": 50}, (17, 18)),  # the maximum wins, and counts the end symbol
        ({"min_length": 50, "max_length_ratio": 0.001}, (0, 1)),
    ],
)
def test_the_bounds_of_the_length(text, subwords, options, bounds):
    sentence = "one"
    while len(subwords.encode([sentence])[0]) < 3:
        sentence += " one"
    found = text.prepare(sentence, "", SearchOptions(**options))
    assert len(found.source) == 4, "the sentence that the bounds are worked out for"
    assert (found.min_length, found.max_length) == bounds


def test_the_default_length_stays_within_the_models(text):
    found = text.prepare("one two three four five six", "", PLAIN)
    assert 2 * len(found.source) + 10 > found.max_length == MAX_SENTENCE_TOKENS


def test_hypotheses_become_text(text, subwords):
    [tokens] = subwords.encode(["two three"])
    sentence = text.prepare("one", "", PLAIN)
    raw = RawHypothesis(tokens=tuple(tokens), log_probability=-2.0, score=-0.5, finished=True)
    found = text.translation(sentence, [raw], PLAIN)
    assert found.source_tokens == len(sentence.source)
    assert found.source_pieces == ()
    assert found.hypotheses == [
        Hypothesis(
            text="two three",
            score=-0.5,
            log_probability=-2.0,
            target_tokens=len(tokens) + 1,
            finished=True,
            tokens=tuple(tokens),
        )
    ]


@pytest.mark.parametrize("options", [{"return_token_scores": True}, {"return_alignment": True}])
@pytest.mark.parametrize("finished", [True, False])
def test_pieces_come_with_scores_and_alignments(text, subwords, options, finished):
    [tokens] = subwords.encode(["two"])
    length = len(tokens) + finished
    raw = RawHypothesis(
        tokens=tuple(tokens),
        log_probability=-2.0,
        score=-0.5,
        finished=finished,
        token_log_probs=(-0.5,) * length,
        alignment=(0,) * length,
    )
    sentence = text.prepare("one", "", PLAIN)
    found = text.translation(sentence, [raw], SearchOptions(**options))
    [one] = found.hypotheses
    assert list(one.pieces) == [subwords.piece(token) for token in tokens] + ["</s>"] * finished
    assert len(one.token_log_probabilities) == len(one.alignment) == one.target_tokens == length
    assert found.source_pieces == [subwords.piece(token) for token in sentence.source]
    assert found.source_pieces[-1] == "</s>"


def test_an_empty_sentence_is_translated_to_nothing(text):
    found = text.translation(PreparedSentence(source=()), (), SearchOptions(n_best=3, return_token_scores=True))
    nothing = Hypothesis(text="", score=0.0, log_probability=0.0, target_tokens=0, finished=True)
    assert (list(found.hypotheses), found.source_tokens, found.source_pieces) == ([nothing], 0, ())


def test_an_empty_sentence_begins_as_it_must(text, subwords):
    options = SearchOptions(return_token_scores=True, return_alignment=True)
    sentence = text.prepare("", "one two", options)
    [hypothesis] = text.translation(sentence, (), options).hypotheses
    assert (hypothesis.text, hypothesis.finished) == ("one two", True)
    assert hypothesis.tokens == tuple(subwords.encode(["one two"])[0])
    assert len(hypothesis.pieces) == len(hypothesis.token_log_probabilities) == hypothesis.target_tokens > 0
    assert (hypothesis.alignment, sum(hypothesis.token_log_probabilities)) == ((), hypothesis.log_probability)
    [plain] = text.translation(text.prepare("", "one two", PLAIN), (), PLAIN).hypotheses
    assert (plain.text, plain.pieces, plain.token_log_probabilities) == ("one two", (), ())


def test_operator_may_allow_longer_and_shorter_translations(subwords):
    for limit in (5, 4000):
        text = SentenceText(subwords, MAX_SENTENCE_TOKENS, limit)
        assert text.prepare("one", "", SearchOptions(max_length=4096)).max_length == limit


def test_length_alone_refuses_text_before_it_is_split(subwords):
    class NoSubwords:
        def encode(self, texts):
            assert not any(texts), "a text that must be refused was looked at"
            return [[] for _ in texts]

    text = SentenceText(NoSubwords(), MAX_SENTENCE_TOKENS)
    longest = "x " * (16 * (MAX_SENTENCE_TOKENS - 1))
    assert violations(text.prepare, longest + "x", "", PLAIN) == [("sentence", "SENTENCE_TOO_LONG")]
    assert violations(text.prepare, "", longest + "x", PLAIN) == [("prefix", "PREFIX_TOO_LONG")]
    assert least_subwords(longest) == MAX_SENTENCE_TOKENS
    assert [least_subwords(words) for words in (" \n", "x", "x" * 17, "\u00e9" * 64)] == [0, 2, 3, 2]
