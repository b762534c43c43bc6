"""What /metrics tells of calls and translations."""

import contextlib

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ferryman.v1 import model_pb2, training_pb2, translation_pb2


@pytest.fixture
def counted(service, eventually):
    """A function that makes a call, which may fail, and checks what that adds to a sample."""

    def check(call, adds, name, **labels):
        before = service.metric(name, **labels)
        with contextlib.suppress(grpc.RpcError):
            call()
        eventually(lambda: service.metric(name, **labels) == pytest.approx(before + adds))

    return check


def method(service, name, kind="unary"):
    return {"grpc_service": f"ferryman.v1.{service}", "grpc_method": name, "grpc_type": kind}


@pytest.mark.parametrize(("model", "code"), [("en-de", "OK"), ("nobody", "NOT_FOUND"), ("!", "INVALID_ARGUMENT")])
def test_calls_are_counted_by_code(service, counted, model, code):
    labels = method("ModelService", "GetModel")

    def call():
        service.model_stub.GetModel(model_pb2.GetModelRequest(model=model))

    # The count of seconds is the last that a call changes: once it is there, the next call's counts begin.
    counted(call, 1, "grpc_server_handling_seconds_count", **labels)
    counted(call, 1, "grpc_server_handled_total", **labels, grpc_code=code)
    counted(call, 1, "grpc_server_started_total", **labels)


def test_streams_are_counted_when_they_end(service, counted):
    run_id = service.claimed_run()
    labels = method("TrainingService", "StreamMetrics", "server_stream")

    def call():
        request = training_pb2.StreamMetricsRequest(run_id=run_id, history_only=True)
        list(service.training_stub.StreamMetrics(request))

    counted(call, 1, "grpc_server_handled_total", **labels, grpc_code="OK")


def test_a_bug_is_counted_as_ours(service, counted):
    def call():
        service.translation_stub.Translate(translation_pb2.TranslateRequest(model="en-de", sentences=["break"]))

    labels = method("TranslationService", "Translate")
    counted(call, 1, "grpc_server_handled_total", **labels, grpc_code="INTERNAL")


def test_methods_that_do_not_exist_share_a_label(service, counted):
    labels = {"grpc_service": "other", "grpc_method": "other", "grpc_type": "unary"}

    def call():
        for name in ("/a/b", "/ferryman.v1.TrainingService/Fly", "/x"):
            with pytest.raises(grpc.RpcError):
                service.channel.unary_unary(name)(b"")

    counted(call, 3, "grpc_server_handled_total", **labels, grpc_code="UNIMPLEMENTED")


def test_translations_are_counted(service, counted):
    def call():
        request = translation_pb2.TranslateRequest(model="en-de", sentences=["a small dog", "yes", ""])
        service.translation_stub.Translate(request)

    counted(call, 3, "ferryman_translate_sentences_total")
    counted(call, 6, "ferryman_translate_source_tokens_total")
    counted(call, 7, "ferryman_translate_target_tokens_total")
    counted(call, 1, "ferryman_translate_seconds_count", stage="queue")
    counted(call, 3, "ferryman_translate_seconds_sum", stage="decode")


def test_messages_are_counted_both_ways(service, counted):
    unary = method("ModelService", "GetModel")

    def get():
        service.model_stub.GetModel(model_pb2.GetModelRequest(model="en-de"))

    counted(get, 1, "grpc_server_msg_received_total", **unary)
    counted(get, 1, "grpc_server_msg_sent_total", **unary)

    def fail():
        service.model_stub.GetModel(model_pb2.GetModelRequest(model="nobody"))

    counted(fail, 1, "grpc_server_msg_received_total", **unary)
    counted(fail, 0, "grpc_server_msg_sent_total", **unary)

    upload = method("CorpusService", "UploadCorpus", "client_stream")
    counted(service.upload, 3, "grpc_server_msg_received_total", **upload)
    counted(service.upload, 1, "grpc_server_msg_sent_total", **upload)

    run_id = service.claimed_run()
    records = method("TrainingService", "StreamMetrics", "server_stream")

    def read_history():
        request = training_pb2.StreamMetricsRequest(run_id=run_id, history_only=True)
        assert len(list(service.training_stub.StreamMetrics(request))) == 3

    counted(read_history, 3, "grpc_server_msg_sent_total", **records)
    counted(read_history, 1, "grpc_server_msg_received_total", **records)


def test_messages_of_health_are_counted_though_it_writes_them_itself(service, counted):
    watch = {"grpc_service": "grpc.health.v1.Health", "grpc_method": "Watch", "grpc_type": "server_stream"}

    def look():
        answers = health_pb2_grpc.HealthStub(service.channel).Watch(health_pb2.HealthCheckRequest(), timeout=10)
        next(answers)
        answers.cancel()

    counted(look, 1, "grpc_server_msg_sent_total", **watch)
    counted(look, 1, "grpc_server_msg_received_total", **watch)
