"""Translate with a real bundle, untrained: what depends on subwords and on the search."""

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ferryman.v1 import translation_pb2
from ferryman_service.translation.loader import OnnxBundleLoader
from ferryman_service.translation.onnx_model import OnnxConfig
from ferryman_service.translation.scheduler import SchedulerConfig
from tests.fakes.loopback_service import LoopbackService
from tests.fakes.random_model import random_sentences

INVALID = grpc.StatusCode.INVALID_ARGUMENT


@pytest.fixture(scope="module")
def service(tmp_path_factory, bundle_dir):
    loader = OnnxBundleLoader(OnnxConfig(), SchedulerConfig(threads=2))
    service = LoopbackService(tmp_path_factory.mktemp("service"), loader=loader)
    service.models.import_bundle(bundle_dir, "small")
    yield service
    service.close()


def request(*sentences, **options):
    return translation_pb2.TranslateRequest(model="small", sentences=sentences, options=options)


def test_sentences_are_translated(service):
    answer = service.translation_stub.Translate(request("ba de fi", "", " \t\n ", n_best=3, beam_size=3, max_length=5))
    assert answer.model == "small/1"
    first, *empty = answer.translations
    assert len(first.hypotheses) == 3
    assert all(1 <= hypothesis.target_tokens <= 5 for hypothesis in first.hypotheses)
    for translation in empty:
        [hypothesis] = translation.hypotheses
        assert (hypothesis.text, hypothesis.score, hypothesis.finished, translation.source_tokens) == ("", 0, True, 0)


def test_a_byte_order_mark_and_line_breaks_change_no_translation(service):
    plain, marked, broken = service.translation_stub.Translate(
        request("ba de fi", "\ufeffba de fi", "ba\x85de\v\ffi\u2028", beam_size=2, max_length=5)
    ).translations
    assert plain == marked == broken
    [nothing] = service.translation_stub.Translate(request("\ufeff")).translations
    assert (nothing.hypotheses[0].text, nothing.source_tokens) == ("", 0)


def test_all_that_may_be_asked_of_a_translation(service):
    asked = request(
        "ba de fi ka", "hu le", n_best=2, beam_size=4, min_length=4, return_token_scores=True, return_alignment=True
    )
    asked.target_prefixes.extend(["zu ba", ""])
    answer = service.translation_stub.Translate(asked)
    assert all(one.text.startswith("zu ba") for one in answer.translations[0].hypotheses)
    for translation in answer.translations:
        assert len(translation.source_pieces) == translation.source_tokens
        for one in translation.hypotheses:
            assert len(one.pieces) == len(one.token_log_probabilities) == len(one.alignment) == one.target_tokens >= 4
            assert sum(one.token_log_probabilities) == pytest.approx(one.log_probability, abs=1e-3)
            assert max(one.alignment) < translation.source_tokens
    timings = answer.timings
    assert timings.steps >= max(one.target_tokens for one in answer.translations[0].hypotheses)
    assert timings.mean_batch_rows >= 4
    parts = [duration.ToNanoseconds() for duration in (timings.queue, timings.text, timings.encode, timings.decode)]
    assert min(parts) > 0
    assert max(parts) <= timings.total.ToNanoseconds()


def test_samples_are_those_of_their_seed(service):
    def sample(seed):
        sampling = translation_pb2.Sampling(temperature=1.5, seed=seed)
        answer = service.translation_stub.Translate(request("ba de fi", "hu ka", n_best=3, sampling=sampling))
        return [one.text for translation in answer.translations for one in translation.hypotheses]

    assert len(sample(1)) == 6
    assert sample(1) == sample(1) != sample(2)


def test_a_stream_translates_as_a_call_does(service):
    sentences = random_sentences(150, seed=2)
    options = translation_pb2.TranslateOptions(beam_size=3)
    config = translation_pb2.StreamTranslateConfig(model="small", options=options, window=40)
    numbered = [translation_pb2.StreamSentence(id=str(i), sentence=one) for i, one in enumerate(sentences)]
    messages = [translation_pb2.StreamTranslateRequest(config=config)]
    for first in range(0, 150, 30):
        part = translation_pb2.StreamSentences(sentences=numbered[first : first + 30])
        messages.append(translation_pb2.StreamTranslateRequest(sentences=part))
    found = {}
    for answer in service.translation_stub.StreamTranslate(iter(messages)):
        for one in answer.translations:
            assert one.id not in found
            found[one.id] = one.translation.hypotheses[0].text
    wanted = service.translation_stub.Translate(request(*sentences, beam_size=3))
    assert [found[str(i)] for i in range(150)] == [one.hypotheses[0].text for one in wanted.translations]


def test_a_target_prefix_without_room_is_named(service, refused):
    asked = request("ba", "de", max_length=3)
    asked.target_prefixes.extend(["", "zu ba le mi no pu"])
    refusal = refused(service.translation_stub.Translate, asked)
    assert (refusal.code, refusal.violations) == (INVALID, [("target_prefixes[1]", "PREFIX_TOO_LONG")])


def test_sentences_over_the_limit_and_control_characters_are_all_named(service, refused):
    refusal = refused(service.translation_stub.Translate, request("ba", "ba " * 200, "a\x00b", "\x7f", "a\u2028b\tc"))
    assert (refusal.code, refusal.reason) == (INVALID, "INVALID_SENTENCE")
    assert sorted(refusal.violations) == [
        ("sentences[1]", "SENTENCE_TOO_LONG"),
        ("sentences[2]", "CONTROL_CHARACTER"),
        ("sentences[3]", "CONTROL_CHARACTER"),
    ]


@pytest.mark.parametrize("split_sentences", [False, True])
def test_runs_of_combining_marks_hold_up_nobody(service, refusal_of, split_sentences):
    """Each of these took tens of seconds to normalise, in which no other thread of the server ran."""
    texts = ["ba" + "\u0301" * 8_000, "a" + "\u0301" * 200_000, "ba. " + "\u0327\u0301" * 100_000 + " de."]
    asked = request(*texts, beam_size=1)
    asked.split_sentences = split_sentences
    bad_call = service.translation_stub.Translate.future(asked, timeout=60)
    for _ in range(3):
        assert service.translation_stub.Translate(request("ba de"), timeout=10).translations[0].hypotheses
        health = health_pb2_grpc.HealthStub(service.channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
        assert health.status == health_pb2.HealthCheckResponse.SERVING
    refusal = refusal_of(bad_call.exception())
    assert (refusal.code, refusal.reason) == (INVALID, "INVALID_SENTENCE")
    assert dict(refusal.violations).keys() == {"sentences[0]", "sentences[1]", "sentences[2]"}
    assert ("sentences[0]", "TOO_MANY_MARKS") in refusal.violations


def test_runs_of_combining_marks_are_errors_of_their_sentence_in_a_stream(service):
    config = translation_pb2.StreamTranslateConfig(model="small")
    marks = "\u0301" * 8_000
    sentences = [
        translation_pb2.StreamSentence(id="good", sentence="ba de"),
        translation_pb2.StreamSentence(id="sentence", sentence="ba" + marks),
        translation_pb2.StreamSentence(id="prefix", sentence="ba", target_prefix="ba" + marks),
        translation_pb2.StreamSentence(id="unknown", sentence="ba", target_prefix="«ba»"),
    ]
    part = translation_pb2.StreamSentences(sentences=sentences)
    messages = [
        translation_pb2.StreamTranslateRequest(config=config),
        translation_pb2.StreamTranslateRequest(sentences=part),
    ]
    answers = service.translation_stub.StreamTranslate(iter(messages), timeout=60)
    errors = {one.id: one.error for answer in answers for one in answer.translations}
    assert {name: error.reason for name, error in errors.items()} == {
        "good": "",
        "sentence": "TOO_MANY_MARKS",
        "prefix": "TOO_MANY_MARKS",
        "unknown": "UNKNOWN_CHARACTER",
    }
    assert "'«' (U+00AB), '»' (U+00BB)" in errors["unknown"].message


def test_five_hundred_bad_sentences_fit_the_answer(service, refused):
    refusal = refused(service.translation_stub.Translate, request(*["a\x01b"] * 500))
    metadata = refusal.details["ErrorInfo"].metadata
    assert (refusal.code, metadata["violations_total"]) == (INVALID, "500")
    assert 10 < int(metadata["violations_shown"]) == len(refusal.violations) < 500
    assert refusal.violations[0] == ("sentences[0]", "CONTROL_CHARACTER")


@pytest.mark.parametrize("count", [0, 1025, 10_000])
def test_the_number_of_sentences_is_bounded(service, refused, count):
    refusal = refused(service.translation_stub.Translate, request(*["ba"] * count))
    assert (refusal.code, refusal.violations) == (INVALID, [("sentences", "OUT_OF_RANGE")])
    assert "1,024" in refusal.message


def test_as_many_sentences_as_are_allowed(service):
    answer = service.translation_stub.Translate(request(*["ba de"] * 1024, beam_size=1, max_length=3))
    texts = {translation.hypotheses[0].text for translation in answer.translations}
    assert (len(answer.translations), len(texts)) == (1024, 1)
