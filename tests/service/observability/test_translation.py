"""What /metrics tells of translating."""

import pytest

from ferryman_service.domain.translation import Hypothesis, Timings, Translation
from ferryman_service.observability.translation import TranslationMetrics

TIMINGS = Timings(
    queue_ns=1_000_000, text_ns=2_000_000, encode_ns=3_000_000, decode_ns=2 * 10**9, steps=7, row_steps=70
)


@pytest.fixture
def queued():
    return [12, 34]


@pytest.fixture
def metrics(registry, queued):
    return TranslationMetrics(registry, lambda: tuple(queued), 1000)


def translation(source_tokens, target_tokens):
    hypothesis = Hypothesis(text="", score=0, log_probability=0, target_tokens=target_tokens, finished=True)
    return Translation(hypotheses=[hypothesis, hypothesis], source_tokens=source_tokens)


def test_calls_by_stage(metrics, sample):
    metrics.observe_call(TIMINGS, 9.5)
    stages = {
        stage: sample("ferryman_translate_seconds_sum", stage=stage) for stage in ("queue", "text", "encode", "decode")
    }
    assert stages == pytest.approx({"queue": 0.001, "text": 0.002, "encode": 0.003, "decode": 2.0})
    assert sample("ferryman_translate_batch_rows_sum") == 9.5


def test_a_call_without_steps_has_no_batch(metrics, sample):
    metrics.observe_call(Timings(), 0.0)
    assert sample("ferryman_translate_batch_rows_count") == 0


def test_sentences(metrics, sample):
    metrics.observe_sentences([translation(5, 8), translation(3, 2)], [TIMINGS, TIMINGS, TIMINGS])
    assert sample("ferryman_translate_sentences_total") == 3
    assert sample("ferryman_translate_source_tokens_total") == 8
    assert sample("ferryman_translate_target_tokens_total") == 10
    assert sample("ferryman_translate_sentence_target_tokens_sum") == 10
    assert sample("ferryman_translate_sentence_target_tokens_count") == 2
    assert sample("ferryman_translate_sentence_steps_sum") == 21
    assert sample("ferryman_translate_sentence_seconds_sum", stage="queue") == pytest.approx(0.003)
    assert sample("ferryman_translate_sentence_seconds_sum", stage="decode") == pytest.approx(6.0)


def test_a_sentence_for_which_nothing_was_found(metrics, sample):
    metrics.observe_sentences([Translation(hypotheses=[], source_tokens=4)], [TIMINGS])
    assert sample("ferryman_translate_sentences_total") == 1
    assert sample("ferryman_translate_source_tokens_total") == 4
    assert sample("ferryman_translate_sentence_target_tokens_count") == 0


def test_in_flight_and_waiting_sentences_are_measured(metrics, sample, queued):
    with metrics.in_flight("StreamTranslate"):
        assert sample("ferryman_translate_in_flight", method="StreamTranslate") == 1
        assert sample("ferryman_translate_in_flight", method="Translate") == 0
    assert sample("ferryman_translate_in_flight", method="StreamTranslate") == 0
    assert sample("ferryman_translate_queue_tokens", method="Translate") == 12
    queued[1] = 56
    assert sample("ferryman_translate_queue_tokens", method="StreamTranslate") == 56
    for method in ("Translate", "StreamTranslate"):
        assert sample("ferryman_translate_queue_limit_tokens", method=method) == 1000
    assert sample("ferryman_translate_requests_total", method="StreamTranslate") == 1
    assert sample("ferryman_translate_requests_total", method="Translate") == 0


def test_rejections(metrics, sample):
    assert sample("ferryman_translate_rejected_total") == 0
    metrics.rejected()
    assert sample("ferryman_translate_rejected_total") == 1
