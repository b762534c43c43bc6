"""Limits on calls in flight, on messages that do not arrive, and on open files."""

import errno
import queue

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ferryman.v1 import corpus_pb2, model_pb2, translation_pb2
from ferryman_service.bundle.manifest import verify
from ferryman_service.rpc.request_limits import RequestLimits
from tests.fakes.loopback_service import upload_messages
from tests.fakes.open_files import no_file_left
from tests.fakes.raw_http2 import RawHttp2
from tests.fakes.translator import FakeBundleLoader

LIST_MODELS = "/ferryman.v1.ModelService/ListModels"
UPLOAD = "/ferryman.v1.CorpusService/UploadCorpus"
STREAM_TRANSLATE = "/ferryman.v1.TranslationService/StreamTranslate"
CHECK = "/grpc.health.v1.Health/Check"
SIZE = 200_000
SMALL = RequestLimits(
    calls=6,
    streams=2,
    transfers=2,
    health_calls=2,
    message_bytes=SIZE,
    message_memory_bytes=8 * SIZE,
    memory_wait_s=0.1,
)


def list_models(service):
    return service.model_stub.ListModels, model_pb2.ListModelsRequest()


def upload(service):
    return service.corpus_stub.UploadCorpus, iter(upload_messages([("one", "eins")]))


def stream_translate(service):
    config = translation_pb2.StreamTranslateConfig(model="en-de")
    return service.translation_stub.StreamTranslate, iter([translation_pb2.StreamTranslateRequest(config=config)])


@pytest.mark.parametrize(
    ("path", "count", "limit", "call"),
    [
        (UPLOAD, 2, "transfers", upload),
        (STREAM_TRANSLATE, 2, "streams", stream_translate),
        (LIST_MODELS, 4, "message_memory", list_models),
    ],
)
def test_calls_beyond_a_limit_are_refused_with_its_name(make_service, refused, eventually, path, count, limit, call):
    service = make_service(limits=SMALL)
    service.import_model("en-de")
    with RawHttp2(service.port) as connection:
        for _ in range(count):
            connection.send_half(path, SIZE)
        eventually(lambda: service.metric("ferryman_incomplete_messages") == count)
        refusal = refused(*call(service))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_CALLS")
        assert refusal.details["ErrorInfo"].metadata == {"limit": limit}
        assert refusal.details["RetryInfo"].retry_delay.seconds > 0
        assert service.metric("ferryman_calls_refused_total", limit=limit) == 1
        health = health_pb2_grpc.HealthStub(service.channel)
        assert health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING
    eventually(lambda: service.metric("ferryman_incomplete_messages") == 0)
    make, request = call(service)
    answer = make(request)
    assert list(answer) == [] if call is stream_translate else answer is not None


def test_a_call_beyond_the_limit_ends_before_its_message_arrives(make_service, eventually):
    service = make_service(limits=RequestLimits(calls=3))
    with RawHttp2(service.port) as connection, RawHttp2(service.port) as other:
        for _ in range(3):
            connection.call(LIST_MODELS)
        eventually(lambda: service.metric("ferryman_calls_in_flight", call_kind="unary") == 3)
        other.wait_for_end(other.call(LIST_MODELS))
        assert service.metric("ferryman_calls_refused_total", limit="calls") == 1


def test_health_checks_have_a_limit_of_their_own(make_service, eventually):
    service = make_service(limits=SMALL)
    with RawHttp2(service.port) as connection:
        for _ in range(2):
            connection.call(CHECK)
        eventually(lambda: service.metric("ferryman_calls_in_flight", call_kind="health") == 2)
        connection.wait_for_end(connection.call(CHECK))
        assert service.metric("ferryman_calls_refused_total", limit="health_calls") == 1
        make, request = list_models(service)
        assert make(request) is not None


def test_a_message_that_waits_for_memory_takes_no_more_than_a_window(make_service, eventually):
    service = make_service(limits=RequestLimits(message_bytes=SIZE, message_memory_bytes=2 * SIZE, memory_wait_s=600))
    with RawHttp2(service.port) as connection:
        held = connection.send_half(LIST_MODELS, SIZE)
        eventually(lambda: service.metric("ferryman_incomplete_messages") == 1)
        waiting = connection.call(LIST_MODELS)
        assert connection.send(waiting, b"\0\0\3\r@" + bytes(SIZE), patience_s=0.5) == 65_535
        assert not {held, waiting} & connection.ended


def test_a_message_that_never_arrives_ends_its_call(make_service, refusal_of):
    service = make_service(limits=RequestLimits(message_bytes=SIZE, first_message_s=0.05, next_upload_message_s=0.05))
    with RawHttp2(service.port) as connection:
        for path in (LIST_MODELS, UPLOAD, STREAM_TRANSLATE, CHECK):
            connection.wait_for_end(connection.send_half(path, SIZE))
    messages = queue.SimpleQueue()
    messages.put(upload_messages([])[0])
    with pytest.raises(grpc.RpcError) as caught:  # the upload has begun, and its next message never comes
        service.corpus_stub.UploadCorpus(iter(messages.get, None))
    messages.put(None)
    refusal = refusal_of(caught.value)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "MESSAGE_OVERDUE")
    assert service.metric("ferryman_calls_refused_total", limit="silence") == 5


def test_a_stream_of_translations_may_pause(make_service):
    service = make_service(limits=RequestLimits(first_message_s=0.2))
    service.import_model("en-de")
    messages = queue.SimpleQueue()
    config = translation_pb2.StreamTranslateConfig(model="en-de")
    messages.put(translation_pb2.StreamTranslateRequest(config=config))
    answers = service.translation_stub.StreamTranslate(iter(messages.get, None), timeout=0.6)
    with pytest.raises(grpc.RpcError):  # its own deadline
        next(answers)
    messages.put(None)
    assert service.metric("ferryman_calls_refused_total", limit="silence") == 0


def test_a_unary_call_needs_a_message(service, refused):
    call = service.channel.stream_unary(LIST_MODELS)
    refusal = refused(call, iter([]))
    assert (refusal.reason, refusal.violations) == ("INVALID_REQUEST", [("request", "REQUIRED")])


def test_a_message_of_an_upload_has_a_limit_of_its_own(make_service, refused):
    service = make_service(limits=RequestLimits(upload_message_bytes=1000), max_corpus_bytes=10**6)
    chunk = corpus_pb2.FileChunk(split="SPLIT_TRAIN", side="SIDE_SOURCE", data=b"x" * 1001)
    messages = [upload_messages([])[0], corpus_pb2.UploadCorpusRequest(chunk=chunk)]
    refusal = refused(service.corpus_stub.UploadCorpus, iter(messages))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "MESSAGE_TOO_LARGE")


@pytest.mark.parametrize(
    ("number", "code", "reason"),
    [
        (errno.EMFILE, "UNAVAILABLE", "TOO_MANY_OPEN_FILES"),
        (errno.ENFILE, "UNAVAILABLE", "TOO_MANY_OPEN_FILES"),
        (errno.EIO, "UNAVAILABLE", "STORE_UNAVAILABLE"),
        (errno.EROFS, "UNAVAILABLE", "STORE_UNAVAILABLE"),
        (errno.ENOSPC, "RESOURCE_EXHAUSTED", "DISK_FULL"),
        (errno.EDQUOT, "RESOURCE_EXHAUSTED", "DISK_FULL"),
        (errno.ENOENT, "INTERNAL", "INTERNAL"),
    ],
)
def test_error_of_the_operating_system_has_its_status(service, refused, caplog, monkeypatch, number, code, reason):
    def fail(*_):
        raise OSError(number, "what the kernel says", "/data/secret-path")

    monkeypatch.setattr(service.models, "list_page", fail)
    refusal = refused(*list_models(service))
    assert (refusal.code.name, refusal.reason) == (code, reason)
    assert "secret-path" not in refusal.message
    assert "secret-path" in caplog.text, "the operator learns which file it was"


class CheckingLoader(FakeBundleLoader):
    """A loader that reads the files, as a real one does."""

    def load(self, bundle):
        verify(bundle)
        return super().load(bundle)


def test_without_open_files_nothing_is_called_damaged(make_service, refused):
    service = make_service(loader=CheckingLoader())
    service.import_model("en-de")
    make, request = list_models(service)
    make(request)  # the channel and a connection to the database are open
    calls = [
        (service.model_stub.LoadModel, model_pb2.LoadModelRequest(model="en-de")),
        (service.model_stub.DownloadModel, model_pb2.DownloadModelRequest(model="en-de")),
        upload(service),
    ]
    with no_file_left():
        refusals = [refused(*call) for call in calls]
    found = {(refusal.code, refusal.reason) for refusal in refusals}
    assert found == {(grpc.StatusCode.UNAVAILABLE, "TOO_MANY_OPEN_FILES")}
    assert service.metric("ferryman_calls_refused_total", limit="open_files") == 2
    assert service.model_stub.LoadModel(model_pb2.LoadModelRequest(model="en-de")).loaded_model.model == "en-de/1"
