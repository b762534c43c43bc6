"""Spans of the client's calls. That they lead into the server is in tests/contract/test_traces.py."""

import contextlib
import subprocess
import sys

import grpc
import pytest
from opentelemetry import trace

from ferryman import Client
from ferryman._tracing import call_span
from ferryman.errors import RunNotFound, Unavailable
from tests.fakes.spans import KeptSpans

GET = "ferryman.v1.TrainingService/GetTrainingRun"
METRICS = "ferryman.v1.TrainingService/StreamMetrics"


@pytest.fixture
def spans(monkeypatch):
    spans = KeptSpans()
    # The API has no way to put the global provider back.
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", spans.provider)
    return spans


def test_refused_call_records_status(client, spans):
    with pytest.raises(RunNotFound):
        client.get_training_run("run_x")
    span = spans.one(GET)
    assert span.kind is trace.SpanKind.CLIENT
    assert span.attributes == {
        "rpc.system": "grpc",
        "rpc.service": "ferryman.v1.TrainingService",
        "rpc.method": "GetTrainingRun",
        "rpc.grpc.status_code": grpc.StatusCode.NOT_FOUND.value[0],
        "error.type": "NOT_FOUND",
    }
    assert span.status.status_code is trace.StatusCode.ERROR


def test_unreachable_server_records_unavailable(spans):
    with Client("127.0.0.1:1", timeout_s=5) as client, pytest.raises(Unavailable):
        client.get_training_run("run_x")
    assert spans.one(GET).attributes["error.type"] == "UNAVAILABLE"


def test_closing_stream_early_is_not_a_failure(client, corpus, spans):
    run = client.start_training(corpus.corpus_id, "en-de")
    with contextlib.closing(client.stream_metrics(run.run_id)) as records:
        next(records)
    span = spans.one(METRICS)
    assert span.attributes["rpc.grpc.status_code"] == grpc.StatusCode.CANCELLED.value[0]
    assert span.status.status_code is trace.StatusCode.UNSET


def test_call_without_provider_has_no_context(monkeypatch):
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", None)
    with call_span("/" + GET) as span:
        assert span.metadata == ()


def test_program_without_tracing_does_not_import_opentelemetry():
    code = """
import sys
from ferryman import Client
from ferryman.testing import FakeFerryman
from ferryman._tracing import call_span
with FakeFerryman() as fake, Client(fake.target) as client:
    list(client.list_models())
with call_span("/a/b") as span:
    print(span.metadata, [name for name in sys.modules if name.startswith("opentelemetry")])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "None []\n"
