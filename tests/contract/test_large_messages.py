"""Requests with far too many elements, and large answers: refused or served without holding up the event loop."""

import threading
import time

import grpc
import pytest

from ferryman.v1 import corpus_pb2, model_pb2, training_pb2, translation_pb2
from ferryman_service.rpc.bounds import element_bounds, repeated_fields
from ferryman_service.rpc.request_limits import RequestLimits
from tests.fakes.loopback_service import upload_messages

CONTRACT = (corpus_pb2, model_pb2, training_pb2, translation_pb2)
MOST_LOOP_S = 0.25
"""Processor time that the event loop's thread may take between two ticks. It takes less than 0.05 s; without the bounds
it was 1.9 to 76 s."""


def test_every_repeated_field_of_every_request_has_a_bound():
    services = [service for file in CONTRACT for service in file.DESCRIPTOR.services_by_name.values()]
    methods = [method for service in services for method in service.methods]
    assert len(methods) > 20
    repeated = {field.full_name for method in methods for field in repeated_fields(method.input_type)}
    assert repeated == element_bounds().keys()


class LoopWatch:
    """Ticks in the service's event loop; `lag_s` is the most processor time that its thread took between two ticks."""

    def __init__(self, service):
        self._loop = service._loop
        self.lag_s = 0.0
        self._ends = threading.Event()

    def __enter__(self):
        self._loop.call_soon_threadsafe(self._begin)
        return self

    def __exit__(self, *_):
        self._ends.set()

    def _begin(self):
        self._last_s = time.thread_time()
        self._loop.call_later(0.002, self._tick)

    def _tick(self):
        now_s = time.thread_time()
        self.lag_s = max(self.lag_s, now_s - self._last_s)
        self._last_s = now_s
        if not self._ends.is_set():
            self._loop.call_later(0.002, self._tick)


def call(service, method, request):
    """Send raw bytes to a method, as the only message or, of a stream, after its first."""
    if isinstance(request, bytes):
        return service.channel.unary_unary(f"/ferryman.v1.{method}")(request, timeout=60)
    return list(service.channel.stream_stream(f"/ferryman.v1.{method}")(iter(request), timeout=60))


def wire_of(message):
    return message.SerializeToString()


HEADER = wire_of(upload_messages([])[0])
CONFIG = wire_of(translation_pb2.StreamTranslateRequest(config=translation_pb2.StreamTranslateConfig(model="en-de")))
MIB = 2**20


def length_delimited(field, content):
    size, varint = len(content), b""
    while size >= 0x80:
        varint += bytes([size & 0x7F | 0x80])
        size >>= 7
    return bytes([field << 3 | 2]) + varint + bytes([size]) + content


PACKED_STATES = length_delimited(3, b"\x01" * MIB)
UNKNOWN_STATES = length_delimited(3, b"\xff\x7f" * (MIB // 2))
EMPTY_SENTENCES = length_delimited(2, b"\x0a\x00" * (RequestLimits.message_bytes // 2 - 8))
EMPTY_PAIRS = length_delimited(2, b"\x08\x01" + b"\x12\x00" * (RequestLimits.upload_message_bytes // 2 - 8))
MANY = {
    "states": ("TrainingService/ListTrainingRuns", PACKED_STATES, "states", "OUT_OF_RANGE"),
    "unknown states": ("TrainingService/ListTrainingRuns", UNKNOWN_STATES, "states", "OUT_OF_RANGE"),
    "single states": ("TrainingService/ListTrainingRuns", b"\x18\x01" * MIB, "states", "OUT_OF_RANGE"),
    "unknown fields": ("TrainingService/ListTrainingRuns", b"\x78\x01" * MIB, "request", "TOO_MANY_FIELDS"),
    "groups": ("TrainingService/ListTrainingRuns", b"\x7b\x7c" * MIB, "request", "TOO_MANY_FIELDS"),
    "a field given often": ("TrainingService/GetTrainingRun", b"\x0a\x00" * MIB, "request", "TOO_MANY_FIELDS"),
    "few too many states": ("TrainingService/ListTrainingRuns", b"\x18\x01" * 17, "states", "OUT_OF_RANGE"),
    "sentences": ("TranslationService/Translate", b"\x12\x00" * MIB, "sentences", "OUT_OF_RANGE"),
    "sentences of a stream": (
        "TranslationService/StreamTranslate",
        [CONFIG, EMPTY_SENTENCES],
        "sentences.sentences",
        "OUT_OF_RANGE",
    ),
    "pairs": ("CorpusService/UploadCorpus", [HEADER, EMPTY_PAIRS], "pairs.pairs", "OUT_OF_RANGE"),
}


@pytest.mark.parametrize("name", MANY)
def test_too_many_elements_are_refused_before_they_are_looped_over(service, refusal_of, name):
    method, request, field, reason = MANY[name]
    with LoopWatch(service) as watch, pytest.raises(grpc.RpcError) as caught:
        call(service, method, request)
    refusal = refusal_of(caught.value)
    assert (refusal.code, refusal.violations) == (grpc.StatusCode.INVALID_ARGUMENT, [(field, reason)])
    assert watch.lag_s < MOST_LOOP_S


def test_large_curves_leave_the_event_loop_free(service):
    request = training_pb2.GetLRScheduleRequest(schedule={"warmup_steps": 4000}, last_step=10**9, max_points=100_000)
    with LoopWatch(service) as watch:
        calls = [service.training_stub.GetLRSchedule.future(request, timeout=120) for _ in range(20)]
        assert {len(each.result().points) for each in calls} == {100_000}
    assert watch.lag_s < MOST_LOOP_S
