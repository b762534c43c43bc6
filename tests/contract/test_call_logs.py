"""What the log says of calls: whose, how they went, and never what was said."""

import json
import logging
import re

import grpc
import pytest

from ferryman import Client
from ferryman.errors import InvalidSentence, ModelNotFound
from ferryman.v1 import training_pb2, translation_pb2
from ferryman_service.config.service_config import LogFormat
from ferryman_service.observability.logs import LogConfig, formatter
from tests.fakes.loopback_service import upload_messages

TRANSLATE = "ferryman.v1.TranslationService/Translate"
TOO_LONG = "one two three four five six seven eight nine geheim"


@pytest.fixture
def log():
    """The lines that the service logs, parsed; one of its threads writes them."""
    lines = []

    class Handler(logging.Handler):
        def emit(self, record):
            lines.append(json.loads(self.format(record)))

    handler = Handler()
    handler.setFormatter(formatter(LogConfig(format=LogFormat.JSON)))
    logger = logging.getLogger("ferryman_service")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)


@pytest.fixture
def service(make_service):
    service = make_service()
    service.import_model("en-de")
    return service


@pytest.fixture
def ended(log, eventually):
    """Wait for the last lines of so many calls of a method, and return them."""

    def wait(method, count=1):
        def lines():
            return [line for line in log if line.get("method") == method and "seconds" in line]

        eventually(lambda: len(lines()) >= count)
        return lines()

    return wait


def request(*sentences):
    return translation_pb2.TranslateRequest(model="en-de", sentences=sentences)


def trailing(call):
    return dict(call.trailing_metadata())["x-request-id"]


def test_a_call_has_one_line_with_its_callers_id(service, ended, log):
    _, call = service.translation_stub.Translate.with_call(
        request("a geheim b"), metadata=[("x-request-id", "page-7/3:a")]
    )
    assert trailing(call) == "page-7/3:a"
    [line] = ended(TRANSLATE)
    assert {key: line[key] for key in ("request_id", "method", "model", "code", "level")} == {
        "request_id": "page-7/3:a",
        "method": TRANSLATE,
        "model": "en-de/1",
        "code": "OK",
        "level": "INFO",
    }
    assert line["seconds"] > 0
    assert "geheim" not in json.dumps(log).lower()


@pytest.mark.parametrize(
    "given", [(), ("",), ("a b",), ("x" * 129,), ("-a",), ('a"b',), ("a,b",), ("{}",)], ids=lambda given: repr(given)
)
def test_without_an_id_that_can_stand_in_a_log_one_is_made(service, ended, given):
    metadata = [("x-request-id", value) for value in given]
    _, call = service.translation_stub.Translate.with_call(request("a"), metadata=metadata)
    assert re.fullmatch("[0-9a-f]{32}", trailing(call))
    assert ended(TRANSLATE)[0]["request_id"] == trailing(call)


def test_a_refusal_is_told_by_field_and_reason_alone(service, ended, log):
    with pytest.raises(grpc.RpcError) as refused:
        service.translation_stub.Translate(request("a", TOO_LONG), metadata=[("x-request-id", "r1")])
    assert trailing(refused.value) == "r1"
    assert dict(refused.value.trailing_metadata())["grpc-status-details-bin"], "the details are still there"
    [line] = ended(TRANSLATE)
    assert (line["code"], line["request_id"]) == ("INVALID_ARGUMENT", "r1")
    assert line["message"].endswith("INVALID_SENTENCE: sentences[1] SENTENCE_TOO_LONG")
    assert "geheim" not in json.dumps(log)


def test_the_sdks_error_has_the_id_that_the_log_has(service, ended):
    with Client(service.address) as client:
        with pytest.raises(InvalidSentence) as refused:
            client.translate("en-de", TOO_LONG)
        with pytest.raises(ModelNotFound) as in_a_stream:
            list(client.translate_stream("nobody", ["a"]))
    [line], [line_of_stream] = ended(TRANSLATE), ended("ferryman.v1.TranslationService/StreamTranslate")
    assert refused.value.request_id == line["request_id"]
    assert in_a_stream.value.request_id == line_of_stream["request_id"]


def test_a_sentence_in_the_place_of_the_model_is_not_told_either(service, ended, log):
    with pytest.raises(grpc.RpcError):
        service.translation_stub.Translate(translation_pb2.TranslateRequest(model="Ganz geheim", sentences=["en-de"]))
    [line] = ended(TRANSLATE)
    assert line["message"].endswith("INVALID_REQUEST: model INVALID_MODEL_REFERENCE")
    assert "geheim" not in json.dumps(log)
    assert "model" not in line


def test_a_bug_is_told_without_the_message_that_may_quote_a_sentence(service, ended, log):
    with pytest.raises(grpc.RpcError) as failed:
        service.translation_stub.Translate(request("break"), metadata=[("x-request-id", "r2")])
    assert (failed.value.code(), trailing(failed.value)) == (grpc.StatusCode.INTERNAL, "r2")
    ended(TRANSLATE)
    bug, end = log
    assert (bug["level"], bug["error"], bug["request_id"], bug["model"]) == (
        "ERROR",
        "ZeroDivisionError",
        "r2",
        "en-de",
    )
    assert (end["code"], end["request_id"]) == ("INTERNAL", "r2")
    assert "secret" not in json.dumps(log)


def test_a_stream_has_one_line_at_its_end(service, ended, log):
    requests = [
        translation_pb2.StreamTranslateRequest(config=translation_pb2.StreamTranslateConfig(model="en-de")),
        translation_pb2.StreamTranslateRequest(
            sentences=translation_pb2.StreamSentences(
                sentences=[translation_pb2.StreamSentence(id="1", sentence="ganz geheim")]
            )
        ),
    ]
    responses = service.translation_stub.StreamTranslate(iter(requests))
    assert len(list(responses)) >= 1
    [line] = ended("ferryman.v1.TranslationService/StreamTranslate")
    assert (line["model"], line["code"], line["request_id"]) == ("en-de/1", "OK", trailing(responses))
    assert "geheim" not in json.dumps(log).lower()


def test_the_run_of_a_call_is_told(service, ended, log):
    run_id = service.start_run().run_id
    service.training_stub.GetTrainingRun(training_pb2.GetTrainingRunRequest(run_id=run_id))
    [started] = ended("ferryman.v1.TrainingService/StartTraining")
    [got] = ended("ferryman.v1.TrainingService/GetTrainingRun")
    assert started["run"] == got["run"] == run_id
    with pytest.raises(grpc.RpcError):
        service.training_stub.GetTrainingRun(training_pb2.GetTrainingRunRequest(run_id="run_\nforged line"))
    assert "run" not in ended("ferryman.v1.TrainingService/GetTrainingRun", 2)[1]


def test_a_corpus_that_is_refused_is_not_quoted(service, ended, log):
    with pytest.raises(grpc.RpcError):
        service.corpus_stub.UploadCorpus(iter(upload_messages([("geheim\nzwei", "secret")])))
    [line] = ended("ferryman.v1.CorpusService/UploadCorpus")
    assert line["code"] == "INVALID_ARGUMENT"
    assert "LINE_BREAK" in line["message"]
    assert "geheim" not in json.dumps(log)


def test_sentences_are_logged_where_that_is_allowed(make_service, ended, log):
    service = make_service(log_sentences=True)
    service.import_model("en-de")
    service.translation_stub.Translate(request("gar nicht geheim"))
    ended(TRANSLATE)
    assert [line["sentences"] for line in log if "sentences" in line] == [["gar nicht geheim"]]
    assert [line["translations"] for line in log if "translations" in line] == [["GAR NICHT GEHEIM"]]
    assert len({line["request_id"] for line in log if "method" in line}) == 1
    with pytest.raises(grpc.RpcError):
        service.translation_stub.Translate(request(TOO_LONG))
    assert "geheim" in json.dumps([line["sentences"] for line in log if "sentences" in line][1])
