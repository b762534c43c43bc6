"""The server itself: health, reflection, limits, ports, an orderly end."""

import logging
import socket
import struct
import threading

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from ferryman.v1 import corpus_pb2, translation_pb2
from ferryman_service.rpc.request_limits import RequestLimits
from tests.fakes.loopback_service import upload_messages

REFLECTION_V1 = "grpc.reflection.v1.ServerReflection"
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.mark.parametrize(("trains", "translates"), [(True, True), (True, False), (False, True)])
def test_health_tells_the_roles(make_service, trains, translates, eventually):
    service = make_service(trains=trains, translates=translates)
    stub = health_pb2_grpc.HealthStub(service.channel)
    wanted = {
        "": SERVING,
        "ferryman.v1.CorpusService": SERVING,
        "ferryman.v1.ModelService": SERVING,
        "ferryman.v1.TrainingService": SERVING if trains else NOT_SERVING,
        "ferryman.v1.TranslationService": SERVING if translates else NOT_SERVING,
    }
    found = {name: stub.Check(health_pb2.HealthCheckRequest(service=name)).status for name in wanted}
    assert found == wanted
    with pytest.raises(grpc.RpcError) as caught:
        stub.Check(health_pb2.HealthCheckRequest(service="nobody"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    labels = {"grpc_service": "grpc.health.v1.Health", "grpc_method": "Check", "grpc_type": "unary"}
    eventually(lambda: service.metric("grpc_server_handled_total", **labels, grpc_code="NOT_FOUND") == 1)


def test_watchers_of_health_learn_of_the_end_and_do_not_hold_it_up(make_service):
    service = make_service()
    watch = health_pb2_grpc.HealthStub(service.channel).Watch(health_pb2.HealthCheckRequest())
    assert next(watch).status == SERVING
    assert service.stop(grace_s=120) < 60
    with pytest.raises(grpc.RpcError) as caught:
        list(watch)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def http2_frame(kind, flags, stream, payload=b""):
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def watch_without_reading(connection):
    """Open a health Watch for whose answers the connection has no room: HTTP/2 flow control with a window of 0."""
    settings, headers, data, acknowledged, end_headers, end_stream = 4, 1, 0, 1, 4, 1
    initial_window_size = struct.pack(">HI", 4, 0)
    fields = {
        b":method": b"POST",
        b":scheme": b"http",
        b":path": b"/grpc.health.v1.Health/Watch",
        b":authority": b"x",
        b"content-type": b"application/grpc",
        b"te": b"trailers",
    }
    literals = b"".join(bytes([0, len(key)]) + key + bytes([len(text)]) + text for key, text in fields.items())
    connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + http2_frame(settings, 0, 0, initial_window_size))
    connection.recv(1)  # the server's settings
    connection.sendall(http2_frame(settings, acknowledged, 0))
    empty_request = bytes(5)
    connection.sendall(http2_frame(headers, end_headers, 1, literals) + http2_frame(data, end_stream, 1, empty_request))


def test_a_watcher_that_does_not_read_holds_up_nobody(make_service, eventually, caplog):
    service = make_service()
    labels = {"grpc_service": "grpc.health.v1.Health", "grpc_method": "Watch", "grpc_type": "server_stream"}
    with socket.create_connection(("127.0.0.1", service.port), timeout=30) as deaf:
        watch_without_reading(deaf)
        eventually(lambda: service.metric("grpc_server_started_total", **labels) == 1)
        watch = health_pb2_grpc.HealthStub(service.channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == SERVING
        service.wait_for(coroutine_of(service.health.begin_stop))
        assert next(watch).status == NOT_SERVING
        service.stop(grace_s=0.5)
        eventually(lambda: service.metric("grpc_server_handled_total", **labels, grpc_code="UNAVAILABLE") == 2)
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


async def coroutine_of(work):
    return work()


def test_calls_in_flight_may_end(make_service, eventually):
    service = make_service()
    begun, go_on = threading.Event(), threading.Event()
    uploads = {
        "grpc_service": "ferryman.v1.CorpusService",
        "grpc_method": "UploadCorpus",
        "grpc_type": "client_stream",
    }

    def messages():
        yield from upload_messages([("one", "eins")])
        begun.set()
        go_on.wait(10)

    call = service.corpus_stub.UploadCorpus.future(messages())
    assert begun.wait(10)
    eventually(lambda: service.metric("grpc_server_started_total", **uploads) == 1)
    stopping = threading.Thread(target=service.stop, kwargs={"grace_s": 10})
    stopping.start()
    health = health_pb2_grpc.HealthStub(service.channel)
    eventually(lambda: not accepts(health))
    go_on.set()
    assert call.result(timeout=10).corpus.train.pairs == 1
    stopping.join()


def test_a_call_that_does_not_end_is_ended_after_the_grace(make_service):
    service = make_service()
    service.import_model("en-de")
    request = translation_pb2.TranslateRequest(model="en-de", sentences=["wait"])
    call = service.translation_stub.Translate.future(request)
    assert service.loader.translator.busy.wait(10)
    assert 0.2 < service.stop(grace_s=0.2) < 5
    assert service.loader.translator.given_up.wait(10)
    assert call.code() is grpc.StatusCode.UNAVAILABLE


def test_a_foreign_client_that_knows_nothing_but_reflection(service):
    pool = DescriptorPool(ProtoReflectionDescriptorDatabase(service.channel))
    method = pool.FindServiceByName("ferryman.v1.TranslationService").FindMethodByName("Translate")
    request = GetMessageClass(method.input_type)(model="en-de", sentences=["from afar"])
    call = service.channel.unary_unary(
        f"/{method.containing_service.full_name}/{method.name}",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=GetMessageClass(method.output_type).FromString,
    )
    assert call(request).translations[0].hypotheses[0].text == "FROM AFAR"


def test_reflection_serves_version_1(service):
    """grpcurl, Postman and Kreya ask for version 1 first; its messages are those of v1alpha."""
    call = service.channel.stream_stream(
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    wanted = [{"list_services": ""}]
    wanted += [{"file_containing_symbol": name} for name in ("ferryman.v1.TranslationService", REFLECTION_V1)]
    names, translation, reflection = call(iter([reflection_pb2.ServerReflectionRequest(**each) for each in wanted]))
    found = {each.name for each in names.list_services_response.service}
    assert {"ferryman.v1.TranslationService", REFLECTION_V1, "grpc.reflection.v1alpha.ServerReflection"} < found
    assert translation.file_descriptor_response.file_descriptor_proto
    [raw] = reflection.file_descriptor_response.file_descriptor_proto
    assert FileDescriptorProto.FromString(raw).package == "grpc.reflection.v1"


def test_reflection_can_be_turned_off(make_service):
    service = make_service(reflection=False)
    with pytest.raises(grpc.RpcError) as caught:
        ProtoReflectionDescriptorDatabase(service.channel).get_services()
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_port_that_is_taken(make_service):
    first = make_service()
    with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{first.port}"):
        make_service(port=first.port)


def test_a_message_over_the_limit(make_service, eventually):
    service = make_service(limits=RequestLimits(message_bytes=10_000))
    chunk = corpus_pb2.FileChunk(split="SPLIT_TRAIN", side="SIDE_SOURCE", data=b"x" * 10_001)
    messages = [upload_messages([])[0], corpus_pb2.UploadCorpusRequest(chunk=chunk)]
    with pytest.raises(grpc.RpcError) as caught:
        service.corpus_stub.UploadCorpus(iter(messages))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    eventually(lambda: not any(service.folder.incoming.iterdir()))
    assert list(service.corpus_stub.ListCorpora(corpus_pb2.ListCorporaRequest()).corpora) == []


def accepts(health):
    try:
        return health.Check(health_pb2.HealthCheckRequest(), timeout=5).status == SERVING
    except grpc.RpcError:
        return False
