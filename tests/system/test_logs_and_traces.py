"""A service that logs JSON and sends traces: one run and a few translations, seen from outside."""

import json

import pytest
from opentelemetry import trace

from ferryman import (
    Client,
    DataRecipe,
    LearningRateSchedule,
    ModelRecipe,
    OptimizationRecipe,
    Recipe,
    RunState,
    StopRecipe,
    ValidationRecipe,
)
from ferryman.errors import InvalidSentence
from tests.fakes.spans import KeptSpans
from tests.fakes.trace_collector import Collector
from tests.system.conftest import WORDS, reversal_corpus
from tests.system.service_process import ServiceProcess

pytestmark = pytest.mark.system

TRANSLATE = "ferryman.v1.TranslationService/Translate"
START = "ferryman.v1.TrainingService/StartTraining"
WORKER = "ferryman-worker"
SENTENCE = "ba ce di fo"
RECIPE = Recipe(
    model=ModelRecipe(d_model=32, encoder_layers=1, decoder_layers=1, heads=2, ffn_dim=64, dropout=0.0),
    data=DataRecipe(vocabulary_size=50, max_sentence_tokens=64),
    schedule=LearningRateSchedule(warmup_steps=20),
    optimization=OptimizationRecipe(batch_target_tokens=512),
    stop=StopRecipe(max_steps=40),
    validation=ValidationRecipe(interval_steps=20, max_translated_pairs=20),
)
TOKEN = "a-token-of-the-collector"
TOO_LONG = " ".join(WORDS * 20)


class Observed:
    """What the tests look at: the spans of service, worker and client, and what was logged."""

    def __init__(self, data_dir, client_spans):
        self.data_dir, self.collector, self.client_spans = data_dir, Collector(), client_spans
        flags = ("--log-format", "json", "--trace-endpoint", self.collector.endpoint)
        service = ServiceProcess(data_dir, *flags, all_cores=True)
        try:
            with Client(service.address) as client:
                self.run_id = self._train(client)
                client.translate("reversal", [SENTENCE, "gu ka"], beam_size=2)
                with pytest.raises(InvalidSentence):
                    client.translate("reversal", TOO_LONG)
        finally:
            status = service.stop()
            self.collector.stop()
        assert status == 0
        self.log = service.log.read_text()
        self.worker_log = (data_dir / "runs" / self.run_id / "worker-1.log").read_text()

    def _train(self, client):
        corpus = client.upload_corpus(
            "reversal", "xx", "yy", train=reversal_corpus(1000, seed=1), validation=reversal_corpus(30, seed=2)
        )
        with self.client_spans.tracer.span("a person starts a run"):
            run = client.start_training(corpus.corpus_id, "reversal", RECIPE)
        assert client.wait(run.run_id).state is RunState.SUCCEEDED
        return run.run_id


@pytest.fixture(scope="module")
def observed(tmp_path_factory):
    spans = KeptSpans()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace, "_TRACER_PROVIDER", spans.provider)  # the API cannot put the global one back
        patch.setenv("OTEL_EXPORTER_OTLP_HEADERS", f"x-token={TOKEN}")
        yield Observed(tmp_path_factory.mktemp("observed") / "data", spans)


def parsed(text):
    return [json.loads(line) for line in text.splitlines()]


def trace_and_span(span):
    """The ids of a span of the client, as they are on the wire."""
    return span.context.trace_id.to_bytes(16, "big"), span.context.span_id.to_bytes(8, "big")


def test_every_line_of_the_service_is_json(observed):
    lines = parsed(observed.log)
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)
    assert any(line["message"].startswith("serving on") for line in lines)
    calls = [line for line in lines if "method" in line]
    assert calls
    assert all(line["request_id"] for line in calls)
    done, failed = [line for line in calls if line["method"] == TRANSLATE]
    assert (done["code"], done["model"], failed["code"]) == ("OK", "reversal/1", "INVALID_ARGUMENT")
    assert done["request_id"] != failed["request_id"]
    [started] = [line for line in calls if line["method"] == START]
    assert started["run"] == observed.run_id


def test_the_worker_logs_in_the_same_form(observed):
    lines = [line for line in observed.worker_log.splitlines() if line.startswith("{")]
    assert lines, observed.worker_log
    first = json.loads(lines[0])
    assert (first["run"], first["attempt"], first["rank"]) == (observed.run_id, "1", "0")
    assert json.loads(lines[-1])["message"] == "the model is published"
    others = [line for line in observed.worker_log.splitlines() if not line.startswith("{")]
    assert not others, others


def test_a_trace_leads_from_the_client_to_the_decoding(observed):
    ours, refused = observed.client_spans.named(TRANSLATE)
    theirs = {span.span_id: span for span in observed.collector.named(TRANSLATE)}
    [decode] = observed.collector.named("decode")
    server = theirs[decode.parent_span_id]
    assert (server.trace_id, server.parent_span_id) == trace_and_span(ours)
    times = [
        ours.start_time,
        server.start_time_unix_nano,
        decode.start_time_unix_nano,
        decode.end_time_unix_nano,
        server.end_time_unix_nano,
    ]
    assert times == sorted(times), "each lies within the one around"
    assert decode.end_time_unix_nano - decode.start_time_unix_nano > 0
    values = {each.key: each.value.int_value for each in decode.attributes}
    assert values["ferryman.sentences"] == 2
    assert values["ferryman.steps"] >= 1
    assert trace_and_span(refused)[0] in {span.trace_id for span in theirs.values()}


def test_a_trace_leads_from_the_client_to_the_worker(observed):
    person = observed.client_spans.one("a person starts a run")
    [server] = observed.collector.named(START)
    [attempt] = observed.collector.named("attempt", WORKER)
    assert server.trace_id == attempt.trace_id == trace_and_span(person)[0]
    assert attempt.parent_span_id == server.span_id
    for name, parent in (("prepare corpus", "attempt"), ("train", "attempt"), ("export", "attempt")):
        [span] = observed.collector.named(name, WORKER)
        assert span.parent_span_id == observed.collector.named(parent, WORKER)[0].span_id
    validations = observed.collector.named("validate", WORKER)
    [train] = observed.collector.named("train", WORKER)
    assert len([span for span in validations if span.parent_span_id == train.span_id]) == 2
    logged = json.loads(observed.worker_log.splitlines()[-1])
    assert logged["trace_id"] == attempt.trace_id.hex()


def test_headers_of_traces_reach_the_collector_and_no_log(observed):
    assert observed.collector.tokens == {"ferryman-service": TOKEN, WORKER: TOKEN}
    assert TOKEN not in observed.log + observed.worker_log


def test_no_sentence_is_in_a_log_or_a_trace(observed):
    for text in (observed.log, observed.worker_log, observed.collector.all_text()):
        assert len(text) > 100
        for pair in (SENTENCE, "gu ka", TOO_LONG[:20]):
            assert pair not in text
            assert pair.upper() not in text


def test_sentences_are_logged_where_a_flag_allows_it(observed, start_service, tmp_path):
    data_dir = observed.data_dir
    service = start_service("--log-format", "json", "--log-sentences", "--roles", "translation", data_dir=data_dir)
    with Client(service.address) as client:
        result = client.translate("reversal", SENTENCE)
    assert service.stop() == 0
    lines = parsed(service.log.read_text())
    assert [line["sentences"] for line in lines if "sentences" in line] == [[SENTENCE]]
    assert [line["translations"] for line in lines if "translations" in line] == [[result.translations[0].text]]
