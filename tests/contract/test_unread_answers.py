"""Clients that do not read their answers: what the service keeps for them is bounded, and others are served."""

import grpc
import pytest

from ferryman.v1 import training_pb2
from ferryman_service.rpc.answer_budget import AnswerBudget
from ferryman_service.rpc.messages import LARGE_ANSWERS, Messages

CURVE = "/ferryman.v1.TrainingService/GetLRSchedule"
BOOKED_BYTES = LARGE_ANSWERS[CURVE]
REQUEST = training_pb2.GetLRScheduleRequest(schedule={"warmup_steps": 4000}, last_step=10**9, max_points=20_000)


@pytest.fixture
def budget():
    """A connection may have some five such answers unread, and others as many."""
    connection_bytes = BOOKED_BYTES + 2**20
    return AnswerBudget(limit_bytes=connection_bytes + 2 * BOOKED_BYTES, connection_bytes=connection_bytes, wait_s=0.2)


@pytest.fixture
def connect(make_service, budget):
    """A maker of callers with connections of their own. Without `next` a call's answer stays in the server."""
    service = make_service(messages=Messages(answers=budget))
    channels = []

    def make():
        small_window = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1))
        channels.append(grpc.insecure_channel(service.address, (("grpc.use_local_subchannel_pool", 1), *small_window)))
        return channels[-1].unary_stream(
            CURVE,
            request_serializer=training_pb2.GetLRScheduleRequest.SerializeToString,
            response_deserializer=training_pb2.GetLRScheduleResponse.FromString,
        )

    yield make
    for channel in channels:
        channel.close()


def test_who_does_not_read_is_refused_and_others_are_served(connect, budget, eventually, refusal_of):
    mine, other = connect(), connect()
    size_bytes = next(other(REQUEST, timeout=60)).ByteSize()
    unread = []
    while True:
        unread.append(mine(REQUEST, timeout=60))
        eventually(lambda: unread[-1].done() or budget.used_bytes == len(unread) * size_bytes)
        if unread[-1].done():
            break
    refusal = refusal_of(unread.pop())
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "ANSWERS_UNREAD")
    assert "on this connection" in refusal.message
    assert len(unread) == 1 + 2**20 // size_bytes
    assert len(next(other(REQUEST, timeout=60)).points) == 20_000
    assert {len(next(call).points) for call in unread} == {20_000}
    eventually(lambda: budget.used_bytes == 0)
    assert len(next(mine(REQUEST, timeout=60)).points) == 20_000


def test_cancelled_calls_give_back_what_they_have(connect, budget, eventually):
    caller = connect()
    for end in (lambda calls: [call.cancel() for call in calls], lambda calls: [call.cancel() for call in calls[::-1]]):
        calls = [caller(REQUEST, timeout=60) for _ in range(8)]  # some are sent, one is made, others wait
        eventually(lambda: budget.used_bytes > 0)
        end(calls)
        eventually(lambda: budget.used_bytes == 0)


def test_all_callers_together_are_bounded(connect, budget, eventually, refusal_of):
    callers = [connect() for _ in range(16)]
    calls = [caller(REQUEST, timeout=60) for caller in callers for _ in range(2)]
    eventually(lambda: any(call.done() for call in calls), timeout_s=60)
    refusal = refusal_of(next(call for call in calls if call.done()))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "ANSWERS_UNREAD")
    assert budget.used_bytes <= 4 * 2**20 + 2 * BOOKED_BYTES
