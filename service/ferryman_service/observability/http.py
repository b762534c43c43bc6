"""The Prometheus endpoint."""

from __future__ import annotations

import platform
import socket
import socketserver
from collections.abc import Callable, Iterable, Iterator
from threading import Thread
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

_PATH: Final = "/metrics"
_CLIENT_TIMEOUT_S: Final = 10


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

    def __init__(self, registry: CollectorRegistry, host: str, port: int) -> None:
        """Store the address; port 0 takes a free one."""
        self.registry = registry
        self._host = host
        self._port = port
        self._running: tuple[WSGIServer, Thread] | None = None

    def start(self) -> int:
        """Listen, and return the port; raises OSError if it cannot be had."""
        kind = _Server6 if ":" in self._host else _Server
        try:
            server = kind((self._host, self._port), _Handler)
        except OSError as error:
            raise OSError(f"cannot listen on {self._host}:{self._port} for metrics: {error}") from error
        server.set_app(_only_metrics(make_wsgi_app(self.registry)))
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
    """A thread per request, which ends with the process."""

    daemon_threads = True

    def server_bind(self) -> None:
        # As WSGIServer does, but without asking the DNS for the host's full name.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    timeout = _CLIENT_TIMEOUT_S

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base's name)
        """Log nothing: a scrape every few seconds is no news."""


def _only_metrics(app: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["PATH_INFO"] == _PATH:
            return app(environ, start_response)
        start_response("404 Not Found", [("Content-Type", "text/plain; charset=utf-8")])
        return [b"the metrics are at /metrics\n"]

    return answer
