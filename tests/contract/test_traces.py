"""One trace from the client's call to the decoding of its sentences, and what a run remembers of it."""

import asyncio

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from opentelemetry import trace

from ferryman import AsyncClient, Client
from ferryman.errors import FerrymanError, InvalidSentence
from ferryman.v1 import training_pb2, translation_pb2
from ferryman_service.domain.runs import ProcessIdentity
from tests.fakes.spans import KeptSpans

TRANSLATE = "ferryman.v1.TranslationService/Translate"
STREAM = "ferryman.v1.TranslationService/StreamTranslate"
START = "ferryman.v1.TrainingService/StartTraining"
REMOTE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
STAGES = ["text", "admission", "encode", "decode"]


@pytest.fixture
def spans(monkeypatch):
    """Kept spans of a service and of this program, which is its client."""
    spans = KeptSpans()
    # The API has no way to put the global provider back.
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", spans.provider)
    return spans


@pytest.fixture
def service(make_service, spans):
    service = make_service(tracer=spans.tracer)
    service.import_model("en-de")
    return service


@pytest.fixture
def client(service):
    with Client(service.address) as client:
        yield client


def test_translate_is_one_trace_from_the_client_to_the_decoding(client, spans, eventually):
    tracer = spans.provider.get_tracer("a program")
    with tracer.start_as_current_span("a page is shown"):
        client.translate("en-de", ["a geheim b", "c"], beam_size=1)
    eventually(lambda: len(spans.named(TRANSLATE)) == 2)
    for stage in STAGES:
        assert spans.ancestors(spans.one(stage)) == [TRANSLATE, TRANSLATE, "a page is shown"]
    [server] = [span for span in spans.named(TRANSLATE) if span.kind is trace.SpanKind.SERVER]
    [ours] = [span for span in spans.named(TRANSLATE) if span.kind is trace.SpanKind.CLIENT]
    assert server.parent.span_id == ours.context.span_id
    assert server.attributes.items() >= {
        ("rpc.system", "grpc"),
        ("rpc.service", "ferryman.v1.TranslationService"),
        ("rpc.method", "Translate"),
        ("rpc.grpc.status_code", 0),
        ("ferryman.model", "en-de/1"),
    }
    assert ours.attributes["rpc.grpc.status_code"] == 0
    assert spans.one("decode").attributes["ferryman.sentences"] == 2
    assert len({span.context.trace_id for span in spans.all()}) == 1
    assert not [span for span in spans.all() if "geheim" in span.to_json().lower()]


def test_the_load_of_a_model_is_seen_once(client, spans, eventually):
    for _ in range(2):
        client.translate("en-de", "a", beam_size=1)
    eventually(lambda: len(spans.named(TRANSLATE)) == 4)
    assert spans.ancestors(spans.one("load")) == [TRANSLATE, TRANSLATE]


def test_a_stream_has_its_stages_once(client, spans, eventually):
    results = list(client.translate_stream("en-de", [f"w{i} geheim" for i in range(300)], beam_size=1))
    assert len(results) == 300
    eventually(lambda: len(spans.named(STREAM)) == 2)
    for stage in STAGES:
        assert spans.ancestors(spans.one(stage)) == [STREAM, STREAM]
    assert spans.one("decode").attributes["ferryman.sentences"] == 300
    assert not [span for span in spans.all() if "geheim" in span.to_json().lower()]


def test_the_asynchronous_client_is_seen_as_the_other(service, spans, eventually):
    async def talk():
        async with AsyncClient(service.address) as client:
            await client.translate("en-de", "a", beam_size=1)
            results = [result async for result in client.translate_stream("en-de", ["b"], beam_size=1)]
            assert len(results) == 1
            assert [model.name async for model in client.list_models()] == ["en-de"]

    asyncio.run(talk())
    eventually(lambda: len(spans.named(STREAM)) == len(spans.named(TRANSLATE)) == 2)
    assert sorted(spans.ancestors(span)[-1] for span in spans.named("decode")) == [STREAM, TRANSLATE]
    assert len(spans.named("ferryman.v1.ModelService/ListModels")) == 2


def test_what_the_caller_does_wrong_is_a_failure_of_the_client_only(client, spans, eventually):
    with pytest.raises(InvalidSentence):
        client.translate("en-de", "one two three four five six seven eight nine geheim", beam_size=1)
    eventually(lambda: len(spans.named(TRANSLATE)) == 2)
    by_kind = {span.kind: span for span in spans.named(TRANSLATE)}
    assert {span.attributes["rpc.grpc.status_code"] for span in by_kind.values()} == {3}
    assert by_kind[trace.SpanKind.SERVER].status.status_code is trace.StatusCode.UNSET
    assert by_kind[trace.SpanKind.CLIENT].status.status_code is trace.StatusCode.ERROR
    assert not [span for span in spans.all() if "geheim" in span.to_json()]


def test_a_bug_is_a_failure_of_the_server_without_its_text(client, spans, eventually):
    with pytest.raises(FerrymanError):
        client.translate("en-de", "break", beam_size=1)
    eventually(lambda: len(spans.named(TRANSLATE)) == 2)
    by_kind = {span.kind: span for span in spans.named(TRANSLATE)}
    assert by_kind[trace.SpanKind.SERVER].status.status_code is trace.StatusCode.ERROR
    assert by_kind[trace.SpanKind.SERVER].attributes["error.type"] == "INTERNAL"
    assert not [span for span in spans.all() if "secret" in span.to_json()]


def test_a_caller_who_gives_up_is_no_failure(service, spans, eventually):
    request = translation_pb2.TranslateRequest(model="en-de", sentences=["wait"])
    call = service.translation_stub.Translate.future(request, metadata=[("traceparent", REMOTE)])
    service.loader.translator.busy.wait(10)
    call.cancel()
    eventually(lambda: spans.named(TRANSLATE))
    span = spans.one(TRANSLATE)
    assert f"{span.parent.span_id:016x}" == "b7ad6b7169203331"
    assert span.attributes["rpc.grpc.status_code"] == grpc.StatusCode.CANCELLED.value[0]
    assert span.status.status_code is trace.StatusCode.UNSET


def test_probes_are_not_traced(service, client, spans, eventually):
    health_pb2_grpc.HealthStub(service.channel).Check(health_pb2.HealthCheckRequest())
    list(client.list_models())
    eventually(lambda: len(spans.named("ferryman.v1.ModelService/ListModels")) == 2)
    assert {span.name for span in spans.all()} == {"ferryman.v1.ModelService/ListModels"}


def test_a_run_remembers_the_trace_it_was_started_in(service, client, spans, eventually):
    corpus_id = service.upload().corpus_id
    tracer = spans.provider.get_tracer("a program")
    with tracer.start_as_current_span("a person starts a run"):
        run = client.start_training(corpus_id, "en-de")
    eventually(lambda: len(spans.named(START)) == 2)
    [server] = [span for span in spans.named(START) if span.kind is trace.SpanKind.SERVER]
    assert spans.ancestors(server) == [START, "a person starts a run"]
    assert server.attributes["ferryman.run"] == run.run_id
    stored = service.runs.get(run.run_id).trace_context
    assert stored.startswith(f"00-{server.context.trace_id:032x}-{server.context.span_id:016x}-")
    # It stays with the run, whoever looks after it and however often it is tried.
    service.runs.begin_attempt(run.run_id, 0)
    claimed = service.runs.claim_attempt(run.run_id, 1, ProcessIdentity(pid=1, start_ticks=1, boot_id="b"))
    assert claimed.trace_context == stored


def test_the_same_request_again_is_the_same_run_in_whatever_trace(service):
    request_id = "0d8e1f6e-6b0a-4c0f-9c34-0f6f0e4b7a11"
    request = training_pb2.StartTrainingRequest(
        corpus_id=service.upload().corpus_id, model_name="en-de", request_id=request_id
    )
    first = service.training_stub.StartTraining(request, metadata=[("traceparent", REMOTE)]).run
    again = service.training_stub.StartTraining(request, metadata=[("traceparent", REMOTE.replace("b7", "c8"))]).run
    assert again.run_id == first.run_id
    assert service.runs.get(first.run_id).trace_context.startswith("00-0af7651916cd43dd8448eb211c80319c-")


def test_without_a_tracer_a_run_remembers_nothing(make_service):
    service = make_service()
    request = training_pb2.StartTrainingRequest(corpus_id=service.upload().corpus_id, model_name="en-de")
    run = service.training_stub.StartTraining(request, metadata=[("traceparent", REMOTE)]).run
    assert service.runs.get(run.run_id).trace_context == ""
