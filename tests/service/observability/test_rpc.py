"""What /metrics tells of calls."""

import pytest

from ferryman_service.observability.rpc import RpcMetrics

LABELS = {"grpc_service": "s", "grpc_method": "M", "grpc_type": "unary"}


@pytest.fixture
def metrics(registry):
    return RpcMetrics(registry)


def test_a_call(metrics, sample):
    calls = metrics.calls_of("s", "M", "unary")
    calls.started()
    calls.received()
    calls.sent()
    calls.sent()
    calls.handled("OK", 0.5)
    assert sample("grpc_server_started_total", **LABELS) == 1
    assert sample("grpc_server_msg_received_total", **LABELS) == 1
    assert sample("grpc_server_msg_sent_total", **LABELS) == 2
    assert sample("grpc_server_handled_total", **LABELS, grpc_code="OK") == 1
    assert sample("grpc_server_handling_seconds_sum", **LABELS) == 0.5
    assert metrics.calls_of("s", "M", "unary") is calls


def test_unknown_methods_share_their_labels(metrics, registry):
    for _ in range(3):
        metrics.unknown_method()
    labels = [sample.labels for family in registry.collect() for sample in family.samples]
    assert {each["grpc_service"] for each in labels if "grpc_service" in each} == {"other"}
