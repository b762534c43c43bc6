"""From sentences to translations: what is refused, what is left out, in which order, how large the batches are."""

import pytest

from ferryman_service.domain.errors import Cancelled, DeadlineExceeded, InvalidSentence
from ferryman_service.domain.tokens import EOS
from ferryman_service.domain.translation import CancelToken, Hypothesis, SearchOptions
from ferryman_service.pipeline.translator import MicroBatchLimit, TextTranslator
from tests.fakes.decoder import FakeDecoder

MAX_SENTENCE_TOKENS = 30


@pytest.fixture
def decoder(copy):
    return FakeDecoder(copy)


@pytest.fixture
def translator(subwords, decoder):
    return TextTranslator(subwords, decoder, MAX_SENTENCE_TOKENS, MicroBatchLimit())


def texts(translations):
    return [translation.hypotheses[0].text for translation in translations]


@pytest.mark.parametrize("beam_size", [1, 3])
def test_the_order_of_the_request_is_kept(translator, beam_size):
    sentences = ["seven", "one two three", "ten", "", "four five six seven eight", "nine ten"]
    translations, _ = translator.translate(sentences, SearchOptions(beam_size=beam_size), CancelToken())
    assert texts(translations) == sentences
    assert [translation.source_tokens > 0 for translation in translations] == [bool(text) for text in sentences]


def test_a_hypothesis_in_full(translator, subwords):
    [translation], _ = translator.translate(["two three"], SearchOptions(beam_size=1), CancelToken())
    [tokens] = subwords.encode(["two three"])
    [hypothesis] = translation.hypotheses
    assert hypothesis.tokens == tuple(tokens)
    assert hypothesis.finished
    assert hypothesis.target_tokens == translation.source_tokens == len(tokens) + 1
    assert hypothesis.score == pytest.approx(hypothesis.log_probability / (len(tokens) + 1))


def test_sentences_are_normalised_and_end_with_the_end_symbol(subwords, copy):
    seen = []

    def note(source, prefix):
        seen.append(tuple(source))
        return copy(source, prefix)

    translator = TextTranslator(subwords, FakeDecoder(note), MAX_SENTENCE_TOKENS, MicroBatchLimit())
    translations, _ = translator.translate([" one \t two\n"], SearchOptions(beam_size=1), CancelToken())
    assert texts(translations) == ["one two"]
    assert set(seen) == {(*subwords.encode(["one two"])[0], EOS)}


@pytest.mark.parametrize("empty", ["", " ", "\t\n", "\u00a0"])
def test_an_empty_sentence_is_not_decoded(translator, decoder, empty):
    [translation], _ = translator.translate([empty], SearchOptions(beam_size=5, n_best=5), CancelToken())
    nothing = Hypothesis(text="", score=0.0, log_probability=0.0, target_tokens=0, finished=True)
    assert translation.hypotheses == [nothing]
    assert translation.source_tokens == 0
    assert decoder.batches == []


def test_every_violation_is_named_at_once(translator, decoder):
    long = " ".join(["one two three four"] * 20)
    with pytest.raises(InvalidSentence) as caught:
        translator.translate(["fine", long, "bad\x00", "fine", long + "\x07"], SearchOptions(), CancelToken())
    named = {(violation.field, violation.reason) for violation in caught.value.violations}
    assert named == {
        ("sentences[1]", "SENTENCE_TOO_LONG"),
        ("sentences[2]", "CONTROL_CHARACTER"),
        ("sentences[4]", "CONTROL_CHARACTER"),
        ("sentences[4]", "SENTENCE_TOO_LONG"),
    }
    assert decoder.batches == []


def test_the_longest_sentence_counts_its_end_symbol(subwords, decoder):
    [tokens] = subwords.encode(["one two three"])
    just_enough = TextTranslator(subwords, decoder, len(tokens) + 1, MicroBatchLimit())
    assert just_enough.max_sentence_tokens() == len(tokens) + 1
    just_enough.translate(["one two three"], SearchOptions(), CancelToken())
    with pytest.raises(InvalidSentence):
        TextTranslator(subwords, decoder, len(tokens), MicroBatchLimit()).translate(
            ["one two three"], SearchOptions(), CancelToken()
        )


@pytest.mark.parametrize(("asked", "limit"), [(None, 28), (4, 4)])
def test_the_maximum_length(subwords, never_ends, asked, limit):
    translator = TextTranslator(subwords, FakeDecoder(never_ends), 28, MicroBatchLimit())
    sentence = "one two three four five six"
    assert 2 * (len(subwords.encode([sentence])[0]) + 1) + 10 > 28
    options = SearchOptions(beam_size=1, max_length=asked)
    [translation], _ = translator.translate([sentence], options, CancelToken())
    assert translation.hypotheses[0].target_tokens == limit
    assert not translation.hypotheses[0].finished


def test_the_default_maximum_length_follows_the_source(subwords, never_ends):
    translator = TextTranslator(subwords, FakeDecoder(never_ends), 1000, MicroBatchLimit())
    [translation], _ = translator.translate(["one"], SearchOptions(beam_size=1), CancelToken())
    assert translation.hypotheses[0].target_tokens == 2 * translation.source_tokens + 10


def test_micro_batches_are_bounded(subwords, decoder):
    translator = TextTranslator(subwords, decoder, 256, MicroBatchLimit(max_positions=500))
    sentences = ["one", "one two three four five"] * 40
    translations, _ = translator.translate(sentences, SearchOptions(beam_size=3), CancelToken())
    assert texts(translations) == sentences
    widest = {len(tokens) + 1 for tokens in subwords.encode(sentences)}
    shortest_positions = min(widest) + 2 * min(widest) + 10
    assert len(decoder.batches) > 1
    assert max(max(batch.row_counts) for batch in decoder.batches) <= 500 // shortest_positions


def test_a_sentence_over_the_limit_goes_alone(subwords, decoder):
    translator = TextTranslator(subwords, decoder, 256, MicroBatchLimit(max_positions=1))
    translations, _ = translator.translate(["one", "two"], SearchOptions(beam_size=2), CancelToken())
    assert texts(translations) == ["one", "two"]
    assert len(decoder.batches) == 2


def test_cancelled_work_stops(translator, decoder):
    token = CancelToken()
    token.cancel()
    with pytest.raises(Cancelled):
        translator.translate(["one"], SearchOptions(), token)
    assert decoder.batches == []


def test_a_search_is_left_when_the_caller_leaves(subwords, never_ends):
    token = CancelToken()

    def leave_after_three(source, prefix):
        if len(prefix) == 3:
            token.cancel()
        return never_ends(source, prefix)

    decoder = FakeDecoder(leave_after_three)
    with pytest.raises(Cancelled):
        TextTranslator(subwords, decoder, 256, MicroBatchLimit()).translate(
            ["one two"], SearchOptions(beam_size=1), token
        )
    assert len(decoder.batches[0].row_counts) == 3


def test_a_passed_deadline_stops_the_work(translator):
    with pytest.raises(DeadlineExceeded):
        translator.translate(["one"], SearchOptions(), CancelToken(deadline_s=0.0))


def test_timings_say_where_the_time_went(translator):
    _, timings = translator.translate(["one two three"], SearchOptions(), CancelToken())
    assert (timings.queue_ns, timings.encode_ns) == (0, 0)
    assert min(timings.text_ns, timings.decode_ns) > 0
