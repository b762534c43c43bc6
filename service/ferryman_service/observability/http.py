"""The Prometheus endpoint."""

from __future__ import annotations

import platform
from threading import Thread
from wsgiref.simple_server import WSGIServer

from prometheus_client import (
    CollectorRegistry,
    GCCollector,
    PlatformCollector,
    ProcessCollector,
    start_http_server,
)


def new_registry() -> CollectorRegistry:
    """Return a registry that also tells about this process."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    if platform.python_implementation() == "CPython":
        GCCollector(registry=registry)
    return registry


class MetricsEndpoint:
    """Serves a registry over HTTP from a thread of its own."""

    def __init__(self, registry: CollectorRegistry, host: str, port: int) -> None:
        """Store the address; port 0 takes a free one."""
        self._registry = registry
        self._host = host
        self._port = port
        self._running: tuple[WSGIServer, Thread] | None = None

    def start(self) -> int:
        """Listen, and return the port; raises OSError if it cannot be had."""
        try:
            server, thread = start_http_server(self._port, self._host, self._registry)
        except OSError as error:
            raise OSError(f"cannot listen on {self._host}:{self._port} for metrics: {error}") from error
        self._running = (server, thread)
        return int(server.server_port)

    def stop(self) -> None:
        """Stop listening; harmless before start."""
        if self._running is not None:
            server, thread = self._running
            server.shutdown()
            server.server_close()
            thread.join()
            self._running = None
