"""The endpoint that Prometheus scrapes."""

import contextlib
import http.client
import logging
import socket
import struct
import threading
import time
import urllib.error
import urllib.request

import pytest
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from ferryman_service.observability.http import EndpointLimits, Hosts, MetricsEndpoint, new_registry


def get(port, path):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as response:
        return response.read().decode()


@pytest.fixture
def serve():
    endpoints = []

    def start(registry, port=0, **limits):
        endpoints.append(MetricsEndpoint(registry, "127.0.0.1", port, EndpointLimits(**limits)))
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


def test_metrics_include_the_process(serve):
    text = get(serve(new_registry()), "/metrics")
    assert "process_resident_memory_bytes" in text
    assert "python_info" in text
    assert "python_gc_objects_collected_total" in text


def test_when_a_counter_was_created_is_not_told(serve):
    registry = new_registry()
    Counter("ferryman_test_total", "A test.", registry=registry).inc()
    assert "_created" not in get(serve(registry), "/metrics")


@pytest.mark.parametrize("path", ["/", "/favicon.ico", "/metrics/x", "/../etc/passwd"])
def test_unknown_paths_are_not_found(serve, path):
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


def test_server_stops(serve):
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


def connect(port):
    return socket.create_connection(("127.0.0.1", port), timeout=30)


def is_closed(client, wait_s):
    """Whether the server closes the connection before the time is over."""
    client.settimeout(wait_s)
    try:
        return client.recv(1) == b""
    except TimeoutError:
        return False
    except ConnectionResetError:
        return True


def test_a_silent_client_is_left_in_the_end(serve):
    with connect(serve(CollectorRegistry(), connection_s=0.2)) as client:
        assert is_closed(client, wait_s=30)


def test_a_client_that_sends_a_byte_now_and_then_is_left_too(serve):
    deadline_s = time.monotonic() + 30
    with connect(serve(CollectorRegistry(), connection_s=0.5)) as client, contextlib.suppress(ConnectionError):
        while not is_closed(client, wait_s=0.05):
            assert time.monotonic() < deadline_s, "it is served for ever"
            client.sendall(b"x")


def test_a_connection_without_a_request_gives_way_to_a_new_one(serve):
    port = serve(CollectorRegistry(), connections=2, connection_s=600)
    with connect(port) as first, connect(port) as second:
        second.sendall(b"GET /metr")
        for _ in range(3):
            assert get(port, "/metrics") == ""
        assert is_closed(first, wait_s=30)


class Slow(Collector):
    """A collector that the scrape waits for."""

    def __init__(self):
        self.begun, self.go_on = threading.Semaphore(0), threading.Event()

    def collect(self):
        self.begun.release()
        self.go_on.wait(30)
        return []


def test_connections_that_are_answered_are_bounded(serve):
    registry, slow = CollectorRegistry(), Slow()
    port = serve(registry, connections=2, connection_s=600)
    registry.register(slow)
    with connect(port) as first, connect(port) as second:
        for client in (first, second):
            client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            slow.begun.acquire(timeout=30)
        with connect(port) as third:
            assert is_closed(third, wait_s=30)
        slow.go_on.set()
        assert first.recv(12) == second.recv(12) == b"HTTP/1.0 200"


@pytest.mark.parametrize(
    ("listens_on", "ours", "others"),
    [
        (
            "127.0.0.1",
            "localhost LOCALHOST:9464 127.0.0.1:9464 [::1]:1 told.example told.example.:1",
            "10.0.0.1 evil.example",
        ),
        ("::1", "localhost [::1]:9464 127.0.0.1", "[fd00::1] 127.0.0.1.evil.example localhost.evil.example"),
        ("localhost", "localhost", "10.0.0.1 evil.example"),
        (
            "0.0.0.0",
            "10.0.0.1 10.0.0.1:9464 [fd00::1]:9464 127.0.0.1 told.example",
            "evil.example evil.example:9464 ferryman",
        ),
        ("metrics.example", "metrics.example 10.0.0.1", "evil.example metrics.example.evil.example [evil]"),
    ],
)
def test_the_host_names_that_are_answered_to(listens_on, ours, others):
    hosts = Hosts(listens_on, ["Told.example"])
    assert [host for host in ours.split() if not hosts.are_ours(host)] == []
    assert [host for host in others.split() if hosts.are_ours(host)] == []
    assert hosts.are_ours(""), "no browser leaves the header out"


def test_a_foreign_host_gets_403_and_everything_says_nosniff(serve):
    port = serve(CollectorRegistry())
    answers = {}
    for host, path in (("evil.example", "/metrics"), ("localhost:1", "/metrics"), ("localhost", "/nothing")):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("GET", path, headers={"Host": host})
        response = connection.getresponse()
        answers[host] = (response.status, response.headers["X-Content-Type-Options"])
        connection.close()
    assert answers == {
        "evil.example": (403, "nosniff"),
        "localhost:1": (200, "nosniff"),
        "localhost": (404, "nosniff"),
    }


def wait_until(condition, timeout_s=30):
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen"
        time.sleep(0.01)


def test_a_client_that_goes_halfway_is_told_to_the_log_alone(serve, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    with connect(serve(CollectorRegistry())) as client:
        client.sendall(b"GET /metr")
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close resets
    wait_until(lambda: caplog.records)
    [record] = caplog.records
    assert record.levelno == logging.DEBUG
    assert "broke" in record.message
    assert capfd.readouterr().err == ""


def test_a_collector_that_fails_is_told_to_the_log_alone(serve, caplog, capfd):
    class Broken:
        def collect(self):
            raise ValueError("a bug")

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Broken())
    with pytest.raises(urllib.error.HTTPError) as caught:
        get(serve(registry), "/metrics")
    assert caught.value.code == 500
    assert [record.message for record in caplog.records] == ["cannot collect the metrics"]
    assert capfd.readouterr().err == ""
