"""Translate with a real bundle, untrained: what depends on subwords and on the search."""

import grpc
import pytest

from ferryman.v1 import translation_pb2
from ferryman_service.translation.loader import OnnxBundleLoader
from ferryman_service.translation.onnx_model import OnnxConfig
from ferryman_service.translation.scheduler import SchedulerConfig
from tests.fakes.loopback_service import LoopbackService

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


def test_sentences_over_the_limit_and_control_characters_are_all_named(service, refused):
    refusal = refused(service.translation_stub.Translate, request("ba", "ba " * 200, "a\x00b", "\x7f", "a\u2028b\tc"))
    assert (refusal.code, refusal.reason) == (INVALID, "INVALID_SENTENCE")
    assert sorted(refusal.violations) == [
        ("sentences[1]", "SENTENCE_TOO_LONG"),
        ("sentences[2]", "CONTROL_CHARACTER"),
        ("sentences[3]", "CONTROL_CHARACTER"),
    ]


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
