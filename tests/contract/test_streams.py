"""StreamMetrics over the wire: live, resumed, quiet, cut short, left alone."""

import threading
import time

import grpc
import pytest

from ferryman.v1 import metrics_pb2, training_pb2
from ferryman_service.domain.records import EventLevel, RunEvent, RunState


def remark(text):
    return RunEvent(level=EventLevel.INFO, code="TEST", message=text)


def stream(service, run_id, after_sequence=0, **fields):
    request = training_pb2.StreamMetricsRequest(run_id=run_id, after_sequence=after_sequence, **fields)
    return service.training_stub.StreamMetrics(request, timeout=20)


def test_a_record_reaches_a_live_subscriber_within_a_quarter_second(service):
    run_id = service.claimed_run()
    responses = stream(service, run_id, after_sequence=3)

    def write():
        for _ in range(20):
            service.runs.append(run_id, 1, [remark(str(time.monotonic()))], None)
            time.sleep(0.02)
        service.runs.change_state(run_id, 1, RunState.CANCELLED)

    writer = threading.Thread(target=write)
    writer.start()
    delays_s, sequences = [], []
    for response in responses:
        sequences.append(response.record.sequence)
        if response.record.HasField("event"):
            delays_s.append(time.monotonic() - float(response.record.event.message))
    writer.join()
    assert sequences == list(range(4, 25))
    assert sorted(delays_s)[len(delays_s) // 2] < 0.25


def test_a_stream_goes_on_where_it_was_left(service):
    run_id = service.claimed_run()
    service.runs.append(run_id, 1, [remark(str(n)) for n in range(1500)], None)
    first = stream(service, run_id)
    seen = [next(first).record.sequence for _ in range(700)]
    first.cancel()
    service.runs.change_state(run_id, 1, RunState.FAILED)
    seen += [response.record.sequence for response in stream(service, run_id, after_sequence=seen[-1])]
    assert seen == list(range(1, 1505))


def test_silence_is_broken_by_heartbeats(make_service):
    service = make_service(heartbeat_s=0.02)
    run_id = service.claimed_run()
    heartbeat = next(stream(service, run_id, after_sequence=3)).heartbeat
    assert (heartbeat.last_sequence, heartbeat.state) == (3, metrics_pb2.RUN_STATE_RUNNING)
    assert heartbeat.interval.ToNanoseconds() == 20_000_000


def test_history_alone(service):
    responses = list(stream(service, service.claimed_run(), history_only=True))
    assert [response.record.sequence for response in responses] == [1, 2, 3]


def test_a_stopping_server_ends_its_streams_at_once(make_service, refusal_of):
    service = make_service()
    run_id = service.claimed_run()
    streams = [stream(service, run_id) for _ in range(5)]
    for responses in streams:
        for _ in range(3):
            next(responses)
    assert service.stop(grace_s=20) < 10
    for responses in streams:
        with pytest.raises(grpc.RpcError) as caught:
            next(responses)
        refusal = refusal_of(caught.value)
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "SERVER_SHUTTING_DOWN")
        assert refusal.details["RetryInfo"].retry_delay.seconds > 0


def test_a_stream_that_is_left_is_over_for_the_server(service, eventually):
    """Its call is counted as ended, and with the last of them the store is asked no more."""
    labels = {"grpc_service": "ferryman.v1.TrainingService", "grpc_method": "StreamMetrics"}
    labels |= {"grpc_type": "server_stream", "grpc_code": "CANCELLED"}
    before = service.metric("grpc_server_handled_total", **labels)
    responses = stream(service, service.claimed_run())
    next(responses)
    responses.cancel()
    eventually(lambda: service.metric("grpc_server_handled_total", **labels) == before + 1)


def test_a_slow_reader_holds_up_nobody(service):
    run_id = service.claimed_run()
    service.runs.append(run_id, 1, [remark("x" * 10_000) for _ in range(2000)], None)
    slow = stream(service, run_id)
    next(slow)
    request = training_pb2.StreamMetricsRequest(run_id=run_id, after_sequence=2000, history_only=True)
    fast = list(service.training_stub.StreamMetrics(request, timeout=10))
    assert fast[-1].record.sequence == 2003
    slow.cancel()
