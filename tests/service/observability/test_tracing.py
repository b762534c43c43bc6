"""Spans from timings, and the tracer over OpenTelemetry."""

import asyncio
import logging
import os
import socket
import subprocess
import sys
import threading
import time

import pytest
from opentelemetry import propagate
from opentelemetry.baggage.propagation import W3CBaggagePropagator
from opentelemetry.propagators.composite import CompositePropagator
from opentelemetry.trace import SpanKind, StatusCode

from ferryman_service.domain.tracing import NULL_TRACER
from ferryman_service.domain.training import PauseRequested
from ferryman_service.domain.translation import Hypothesis, Timings, Translation
from ferryman_service.observability.tracing import StageSpans, TraceConfig, open_tracer
from tests.fakes.spans import KeptSpans

MS = 1_000_000
REMOTE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
NOT_SAMPLED = REMOTE[:-2] + "00"


@pytest.fixture
def spans():
    return KeptSpans()


def sentence(end_ns, queue_ms, encode_ms, decode_ms, steps=4, rows=2):
    return Timings(
        queue_ns=queue_ms * MS,
        text_ns=MS,
        encode_ns=encode_ms * MS,
        decode_ns=decode_ms * MS,
        steps=steps,
        row_steps=steps * rows,
        end_ns=end_ns,
    )


def translation(source_tokens, target_tokens):
    hypothesis = Hypothesis(
        text="geheim", score=0.0, log_probability=0.0, target_tokens=target_tokens, finished=True, tokens=()
    )
    return Translation(hypotheses=[hypothesis], source_tokens=source_tokens)


def times_ms(span, end_ns):
    """Begin and end of a span, milliseconds after the sentences were handed in 100 ms before `end_ns`."""
    epoch_ns = time.time_ns() - time.perf_counter_ns()
    return [round((at - epoch_ns - end_ns) / MS + 100) for at in (span.start_time, span.end_time)]


def test_a_stage_lasts_from_its_first_begin_to_its_last_end(spans):
    end_ns = time.perf_counter_ns()
    stages = StageSpans()
    both = [sentence(end_ns, 10, 20, 70, steps=7), sentence(end_ns - 30 * MS, 20, 10, 40, steps=3, rows=4)]
    stages.add(both, [translation(5, 6), translation(7, 8)])
    with spans.tracer.span("call"):
        stages.record(spans.tracer)
    assert {span.name: times_ms(span, end_ns) for span in spans.all() if span.name != "call"} == {
        "text": [-2, 0],
        "admission": [0, 20],
        "encode": [10, 30],
        "decode": [30, 100],
    }
    decode = spans.one("decode").attributes
    assert decode["ferryman.sentences"] == 2
    assert (decode["ferryman.steps"], decode["ferryman.sentence_steps"]) == (7, 10)
    assert decode["ferryman.mean_batch_rows"] == pytest.approx((7 * 2 + 3 * 4) / 10)
    assert decode["ferryman.target_tokens"] == 14
    assert decode["ferryman.mean_seconds"] == pytest.approx(0.055)
    assert decode["ferryman.longest_seconds"] == pytest.approx(0.07)
    assert spans.one("encode").attributes["ferryman.source_tokens"] == 12
    assert all(span.parent.span_id == spans.one("call").context.span_id for span in spans.all()[:4])


def test_a_stream_of_any_length_has_four_spans(spans):
    stages = StageSpans()
    for _ in range(100):
        stages.add([sentence(time.perf_counter_ns(), 1, 1, 1)], [])
    stages.record(spans.tracer)
    assert len(spans.all()) == 4
    assert spans.one("decode").attributes["ferryman.sentences"] == 100


def test_without_sentences_there_is_nothing_to_tell(spans):
    StageSpans().record(spans.tracer)
    assert spans.all() == ()


def test_spans_lie_in_each_other_and_under_the_one_of_another_process(spans):
    with spans.tracer.span("call", carrier={"traceparent": REMOTE}, serves=True) as call:
        assert call.trace_id == "0af7651916cd43dd8448eb211c80319c"
        stored = spans.tracer.context()
        with spans.tracer.span("inner"):
            spans.tracer.annotate({"ferryman.model": "en-de/1"})
    call, inner = spans.one("call"), spans.one("inner")
    assert (call.kind, inner.kind) == (SpanKind.SERVER, SpanKind.INTERNAL)
    assert f"{call.parent.span_id:016x}" == "b7ad6b7169203331"
    assert inner.parent.span_id == call.context.span_id
    assert inner.attributes == {"ferryman.model": "en-de/1"}
    assert stored == f"00-0af7651916cd43dd8448eb211c80319c-{call.context.span_id:016x}-01"
    assert spans.tracer.context() == ""


def test_a_caller_that_does_not_want_a_trace_gets_none(spans):
    with spans.tracer.span("call", carrier={"traceparent": NOT_SAMPLED}, serves=True) as call:
        assert (call.trace_id, spans.tracer.is_recording()) == ("", False)
        spans.tracer.past("decode", 1, 2)
    assert spans.all() == ()


@pytest.mark.parametrize(
    "parent",
    [{"carrier": {}}, {"carrier": {"traceparent": ""}}, {"carrier": {"traceparent": "00-xyz"}}, {"stored": ""}],
)
def test_without_a_legal_context_a_trace_begins(spans, parent):
    with spans.tracer.span("outer"), spans.tracer.span("call", **parent):
        pass
    assert spans.one("call").parent is None


@pytest.mark.parametrize("propagators", [[], [W3CBaggagePropagator()]])
def test_stored_trace_context_is_restored_for_any_headers(spans, propagators):
    """As with OTEL_PROPAGATORS=none, or baggage."""
    before = propagate.get_global_textmap()
    propagate.set_global_textmap(CompositePropagator(propagators))
    try:
        with spans.tracer.span("call", carrier={"traceparent": REMOTE}) as call:
            assert call.trace_id != REMOTE.split("-")[1], "headers that nobody is to heed"
            stored = spans.tracer.context()
        with spans.tracer.span("attempt", stored=stored):
            pass
    finally:
        propagate.set_global_textmap(before)
    assert spans.one("attempt").parent.span_id == spans.one("call").context.span_id


def test_an_error_marks_the_span_but_is_not_quoted(spans):
    with pytest.raises(ValueError, match="geheim"), spans.tracer.span("export"):
        raise ValueError("geheim")
    span = spans.one("export")
    assert span.status.status_code is StatusCode.ERROR
    assert span.attributes["error.type"] == "ValueError"
    assert "geheim" not in span.to_json()


@pytest.mark.parametrize("error", [PauseRequested(), asyncio.CancelledError()])
def test_to_be_told_to_rest_is_no_failure(spans, error):
    with pytest.raises(type(error)), spans.tracer.span("train"):
        raise error
    assert spans.one("train").status.status_code is StatusCode.UNSET


def test_a_call_says_itself_how_it_went(spans):
    with pytest.raises(ValueError, match="x"), spans.tracer.span("call", serves=True):
        raise ValueError("x")
    assert spans.one("call").status.status_code is StatusCode.UNSET


def test_without_an_endpoint_nothing_is_imported():
    assert open_tracer(TraceConfig()) is NULL_TRACER


def test_without_the_packages_the_service_runs_and_says_so(monkeypatch, caplog):
    for name in list(sys.modules):
        if name.startswith("opentelemetry"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [_Without(), *sys.meta_path])
    assert open_tracer(TraceConfig()) is NULL_TRACER
    assert not caplog.records, "nobody has asked for traces"
    with caplog.at_level(logging.WARNING):
        assert open_tracer(TraceConfig(endpoint="http://localhost:4317")) is NULL_TRACER
    assert "install the extra tracing" in caplog.text


def test_with_settings_that_opentelemetry_does_not_take_the_service_runs_and_says_so():
    """It heeds this one when it is imported, so that takes a process of its own."""
    code = """
from ferryman_service.observability.tracing import TraceConfig, open_tracer
print(type(open_tracer(TraceConfig(endpoint="http://127.0.0.1:4317"))).__name__)
"""
    environment = {**os.environ, "OTEL_PROPAGATORS": "no-such-form"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "NullTracer\n"
    assert (
        "no traces are sent, since OpenTelemetry cannot be set up: ValueError: Propagator no-such-form" in done.stderr
    )


def test_a_collector_that_is_not_there_holds_up_nobody(free_port):
    tracer = open_tracer(TraceConfig(endpoint=f"http://127.0.0.1:{free_port}"))
    began_s = time.monotonic()
    with tracer.span("call"):
        pass
    assert time.monotonic() - began_s < 1
    tracer.close()
    assert time.monotonic() - began_s < 8, "one attempt to send has 10 s"


def test_the_null_tracer_does_nothing_in_every_thread():
    with NULL_TRACER.span("a", {"b": 1}, carrier={"traceparent": REMOTE}) as span:
        span.set({"c": 1})
        span.fail("D")
        assert (span.trace_id, NULL_TRACER.context(), NULL_TRACER.is_recording()) == ("", "", False)
        thread = threading.Thread(target=NULL_TRACER.past, args=("e", 1, 2))
        thread.start()
        thread.join()
    NULL_TRACER.close()


class _Without:
    """A finder that hides OpenTelemetry."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "opentelemetry":
            raise ModuleNotFoundError(name)


@pytest.fixture
def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def test_a_service_that_does_not_trace_does_not_load_opentelemetry():
    code = """
import sys
import ferryman_service.bootstrap, ferryman_service.worker, ferryman
print([name for name in sys.modules if name.startswith("opentelemetry")])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
