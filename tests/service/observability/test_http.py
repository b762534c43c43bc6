"""The endpoint that Prometheus scrapes."""

import socket
import urllib.error
import urllib.request

import pytest
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.parser import text_string_to_metric_families

from ferryman_service.observability.http import MetricsEndpoint, new_registry


def get(port, path):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as response:
        return response.read().decode()


@pytest.fixture
def serve():
    endpoints = []

    def start(registry, port=0):
        endpoints.append(MetricsEndpoint(registry, "127.0.0.1", port))
        return endpoints[-1].start()

    yield start
    for endpoint in endpoints:
        endpoint.stop()


def test_the_registry_is_served(serve):
    registry = CollectorRegistry()
    Counter("ferryman_test_total", "A test.", registry=registry).inc(3)
    families = list(text_string_to_metric_families(get(serve(registry), "/metrics")))
    found = {sample.name: sample.value for family in families for sample in family.samples}
    assert found["ferryman_test_total"] == 3


def test_it_tells_about_the_process_too(serve):
    text = get(serve(new_registry()), "/metrics")
    assert "process_resident_memory_bytes" in text
    assert "python_info" in text
    assert "python_gc_objects_collected_total" in text


def test_when_a_counter_was_created_is_not_told(serve):
    registry = new_registry()
    Counter("ferryman_test_total", "A test.", registry=registry).inc()
    assert "_created" not in get(serve(registry), "/metrics")


@pytest.mark.parametrize("path", ["/", "/favicon.ico", "/metrics/x", "/../etc/passwd"])
def test_there_is_nothing_else(serve, path):
    with pytest.raises(urllib.error.HTTPError) as caught:
        get(serve(CollectorRegistry()), path)
    assert caught.value.code == 404


def test_two_endpoints_tell_of_their_own_registry(serve):
    first, second = CollectorRegistry(), CollectorRegistry()
    Counter("first_total", "A test.", registry=first)
    assert "first_total" in get(serve(first), "/metrics")
    assert "first_total" not in get(serve(second), "/metrics")


def test_a_port_that_is_taken(serve):
    port = serve(CollectorRegistry())
    with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port} for metrics"):
        serve(CollectorRegistry(), port=port)


def test_it_stops(serve):
    endpoint = MetricsEndpoint(CollectorRegistry(), "127.0.0.1", 0)
    port = endpoint.start()
    endpoint.stop()
    endpoint.stop()
    with pytest.raises(urllib.error.URLError):
        get(port, "/metrics")


def test_a_silent_client_holds_up_nobody(serve):
    port = serve(CollectorRegistry())
    with socket.create_connection(("127.0.0.1", port)):
        get(port, "/metrics")
