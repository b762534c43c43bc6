"""The order in which the server ends: held calls, goodbyes, last words."""

import threading
import time

import grpc
import pytest
from google.rpc.error_details_pb2 import ErrorInfo
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from ferryman.v1 import model_pb2, translation_pb2
from ferryman_service.rpc.server import RpcConfig
from tests.fakes.loopback_service import LoopbackService


@pytest.fixture
def make_service(tmp_path):
    services = []

    def make(**config):
        services.append(LoopbackService(tmp_path, **config))
        services[-1].import_model("en-de")
        return services[-1]

    yield make
    for service in services:
        service.close()


def reason_of(call):
    with pytest.raises(grpc.RpcError) as caught:
        call.result(timeout=10)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    info = ErrorInfo()
    assert any(detail.Unpack(info) for detail in rpc_status.from_call(caught.value).details)
    return info.reason


def busy(service):
    """A call that ends when its caller gives up."""
    call = service.translation_stub.Translate.future(
        translation_pb2.TranslateRequest(model="en-de", sentences=["wait"])
    )
    assert service.loader.translator.busy.wait(10)
    return call


def test_calls_that_come_while_it_closes_are_held_then_told_to_call_again(make_service):
    """gRPC would cancel them, and callers could not tell that from a cancellation of their own."""
    service = make_service(hold_s=3)
    in_flight = busy(service)
    stopping = threading.Thread(target=service.stop, kwargs={"grace_s": 20})
    stopping.start()
    health = health_pb2_grpc.HealthStub(service.channel)
    while health.Check(health_pb2.HealthCheckRequest(), timeout=5).status == health_pb2.HealthCheckResponse.SERVING:
        time.sleep(0.01)
    time.sleep(0.1)
    late = [service.model_stub.ListModels.future(model_pb2.ListModelsRequest(), timeout=10) for _ in range(3)]
    time.sleep(0.1)
    assert not any(call.done() for call in late)
    answer = health.Check(health_pb2.HealthCheckRequest(), timeout=5)
    assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING, "probes are not held"
    assert {reason_of(call) for call in late} == {"SERVER_SHUTTING_DOWN"}
    assert not in_flight.done(), "what was in flight goes on"
    in_flight.cancel()
    stopping.join()


def test_a_call_that_does_not_end_in_time_is_told_why(make_service):
    service = make_service()
    call = busy(service)
    assert service.stop(grace_s=0.3) < 3
    assert reason_of(call) == "SERVER_SHUTTING_DOWN"
    assert service.loader.translator.given_up.wait(10), "its rows are free"


def test_a_connection_ages_only_if_it_shall():
    aged = dict(RpcConfig(max_connection_age_s=1.5, max_connection_age_grace_s=0.5).options())
    assert (aged["grpc.max_connection_age_ms"], aged["grpc.max_connection_age_grace_ms"]) == (1500, 500)
    assert "grpc.max_connection_age_ms" not in dict(RpcConfig().options())
