"""The Prometheus endpoint."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import platform
import re
import socket
import socketserver
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from threading import Lock, Thread
from typing import Any, Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import (
    CollectorRegistry,
    GCCollector,
    Metric,
    PlatformCollector,
    ProcessCollector,
    make_wsgi_app,
)

_log = logging.getLogger(__name__)
_PATH: Final = "/metrics"
_ACCEPT_PAUSE_S: Final = 0.1
_PORT: Final = re.compile(r":\d{0,5}$")


@dataclass(frozen=True, kw_only=True)
class EndpointLimits:
    """How many connections at once, each of which has a thread, and how long one may take from its first byte to its
    last. Where all are taken, a new one takes the place of the oldest that has not sent its request, if there is one:
    a client sends it at once."""

    connections: int = 32
    connection_s: float = 10.0


class Hosts:
    """The values of the header Host that an endpoint answers to: localhost, the address that it listens on, the names
    that it is given, and IP addresses: those of loopback, or, where it listens beyond loopback, every one.

    A web page of another site can let its own host name lead to this endpoint (DNS rebinding), and then read what it
    answers. Its browser sends that name; it never sends an IP address for one, nor leaves the header out.
    """

    def __init__(self, listens_on: str, names: Iterable[str] = ()) -> None:
        """Store the names, which are equal whatever their case."""
        self._names = {"localhost", listens_on.lower(), *(name.lower().rstrip(".") for name in names)}
        address = _address(listens_on)
        self._only_loopback = listens_on == "localhost" or (address is not None and address.is_loopback)

    def are_ours(self, header: str) -> bool:
        """Tell whether the value, a host and perhaps a port, is one to answer to; without a header it is ""."""
        host = _PORT.sub("", header.strip()).removeprefix("[").removesuffix("]").lower().rstrip(".")
        address = _address(host)
        if address is not None:
            return address.is_loopback or not self._only_loopback
        return not header or host in self._names


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


class _Registry(CollectorRegistry):
    """Without the `_created` series that prometheus_client adds to every counter and histogram: nobody asks for them,
    and they would be a quarter of all series."""

    def collect(self) -> Iterator[Metric]:
        for family in super().collect():
            family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
            yield family


def new_registry() -> CollectorRegistry:
    """Return a registry that also tells about this process."""
    registry = _Registry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    if platform.python_implementation() == "CPython":
        GCCollector(registry=registry)
    return registry


class MetricsEndpoint:
    """Serves a registry over HTTP, at /metrics and nowhere else, from a thread of its own."""

    def __init__(
        self,
        registry: CollectorRegistry,
        host: str,
        port: int,
        limits: EndpointLimits | None = None,
        host_names: Iterable[str] = (),
    ) -> None:
        """Store the address; port 0 takes a free one. `host_names` are answered to beyond those of `Hosts`."""
        self._hosts = Hosts(host, host_names)
        self.registry = registry
        self._host = host
        self._port = port
        self._limits = limits or EndpointLimits()
        self._running: tuple[WSGIServer, Thread] | None = None

    def start(self) -> int:
        """Listen, and return the port; raises OSError if it cannot be had."""
        kind = _Server6 if ":" in self._host else _Server
        try:
            server = kind((self._host, self._port), self._limits)
        except OSError as error:
            raise OSError(f"cannot listen on {self._host}:{self._port} for metrics: {error}") from error
        server.set_app(_only_metrics(make_wsgi_app(self.registry), self._hosts))
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, name="metrics-http", daemon=True)
        thread.start()
        self._running = (server, thread)
        return server.server_port

    def stop(self) -> None:
        """Stop listening; harmless before start."""
        if self._running is not None:
            server, thread = self._running
            server.shutdown()
            server.server_close()
            thread.join()
            self._running = None


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    """A thread per connection, which ends with the process."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], limits: EndpointLimits) -> None:
        self._limits = limits
        self._lock = Lock()
        self._begun_s: dict[socket.socket, float] = {}
        self._answering: set[socket.socket] = set()
        super().__init__(address, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:  # noqa: ANN401 (the base's types)
        with self._lock:
            is_room = len(self._begun_s) < self._limits.connections or self._end_oldest_idle()
            if is_room:
                self._begun_s[request] = time.monotonic()
        if is_room:
            super().process_request(request, client_address)
        else:
            _log.debug("%d connections are open, closing that of %s", self._limits.connections, client_address)
            self.shutdown_request(request)

    def begin_answer(self, request: socket.socket) -> None:
        """Note that the request has arrived: its connection is not idle."""
        with self._lock:
            self._answering.add(request)

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            return super().get_request()
        except OSError:
            time.sleep(_ACCEPT_PAUSE_S)  # no file is left to open: the connection waits, and accept fails until then
            raise

    def shutdown_request(self, request: Any) -> None:  # noqa: ANN401 (the base's types)
        with self._lock:
            self._begun_s.pop(request, None)
            self._answering.discard(request)
        super().shutdown_request(request)

    def _end_oldest_idle(self) -> bool:
        """End the oldest connection without a request, whose thread notices; return False if there is none."""
        for request in self._begun_s:  # in the order of their beginning
            if request not in self._answering:
                del self._begun_s[request]
                with contextlib.suppress(OSError):
                    request.shutdown(socket.SHUT_RDWR)
                return True
        return False

    def service_actions(self) -> None:
        # Called by serve_forever several times a second. A limit for each receive or send would never end a client who
        # sends or takes a byte now and then.
        with self._lock:  # under which none is closed, so that its number cannot belong to another yet
            for request, begun_s in self._begun_s.items():
                if time.monotonic() - begun_s > self._limits.connection_s:
                    with contextlib.suppress(OSError):
                        request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: object, client_address: object) -> None:
        # A client that leaves halfway is no news; anything else is a bug.
        if isinstance(sys.exc_info()[1], OSError):
            _log.debug("the connection of %s broke", client_address, exc_info=True)
        else:
            _log.exception("cannot answer %s", client_address)

    def server_bind(self) -> None:
        # As WSGIServer does, but without asking the DNS for the host's full name.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    server: _Server

    def parse_request(self) -> bool:
        """As the base does, and tell the server."""
        is_request = super().parse_request()
        self.server.begin_answer(self.request)
        return is_request

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base's name)
        """Log nothing: a scrape every few seconds is no news."""


def _only_metrics(app: Callable[..., Iterable[bytes]], hosts: Hosts) -> Callable[..., Iterable[bytes]]:
    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if not hosts.are_ours(environ.get("HTTP_HOST", "")):
            return _say("403 Forbidden", "this host name is not one of --metrics-host-names\n", start_response)
        if environ["PATH_INFO"] != _PATH:
            return _say("404 Not Found", "the metrics are at /metrics\n", start_response)
        try:
            return app(environ, _with_nosniff(start_response))
        except Exception:  # noqa: BLE001 (a bug of one collector; the server would print it)
            _log.exception("cannot collect the metrics")
            return _say("500 Internal Server Error", "the metrics cannot be collected\n", start_response)

    return answer


def _with_nosniff(start_response: Callable[..., Any]) -> Callable[..., Any]:
    """Return it as one that forbids a browser to take the answer for a program."""

    def start(status: str, headers: list[tuple[str, str]], *rest: object) -> Any:  # noqa: ANN401 (WSGI's type)
        return start_response(status, [*headers, ("X-Content-Type-Options", "nosniff")], *rest)

    return start


def _say(status: str, text: str, start_response: Callable[..., Any]) -> Iterable[bytes]:
    _with_nosniff(start_response)(status, [("Content-Type", "text/plain; charset=utf-8")])
    return [text.encode()]
