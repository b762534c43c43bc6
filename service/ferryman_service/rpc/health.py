"""grpc.health.v1: whether each service can do its work, on the main port and, in plain text, on a port for probes.

The names, and what they tell:

* a service of the contract: this process serves it and can do what it is for (`application/readiness.py`);
* "" (the server as a whole): every role of this process can do its work;
* "liveness": the process lives. It is SERVING until the end; a process that is stuck gives no answer.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ferryman.v1 import corpus_pb2, model_pb2, training_pb2, translation_pb2
from ferryman_service.application.readiness import Abilities, Readiness
from ferryman_service.domain.readiness import StoreState
from ferryman_service.rpc.request_limits import RequestLimits
from ferryman_service.rpc.shutdown import Shutdown

_log = logging.getLogger(__name__)
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

TRAINING: Final[str] = training_pb2.DESCRIPTOR.services_by_name["TrainingService"].full_name
CORPORA: Final[str] = corpus_pb2.DESCRIPTOR.services_by_name["CorpusService"].full_name
MODELS: Final[str] = model_pb2.DESCRIPTOR.services_by_name["ModelService"].full_name
TRANSLATION: Final[str] = translation_pb2.DESCRIPTOR.services_by_name["TranslationService"].full_name
ALL_SERVICES: Final = (TRAINING, CORPORA, MODELS, TRANSLATION)
ROLE_SERVICES: Final = (TRAINING, TRANSLATION)
WHOLE_SERVER: Final = ""
LIVENESS: Final = "liveness"
PROBE_LIMITS: Final = RequestLimits(connections=256, message_bytes=4096)
"""Those of the probe port: probes find places there however many calls the main port has."""
_PROBE_IDLE_MS: Final = 30_000


class HealthServicer(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # its package has no types
    """The state of every name, and the answers to Check and Watch. All methods but `serving` belong to one event loop.

    A change waits for nobody: a watcher that does not read what it is told holds up neither the others nor the end.
    """

    def __init__(self, shutdown: Shutdown, serving: Collection[str] = ALL_SERVICES) -> None:
        """Store; `serving` names the services that this process is for, which are well until something else is said."""
        self._shutdown = shutdown
        self._for = frozenset(serving)
        self._stopping = False
        self._serving = {**dict.fromkeys(ALL_SERVICES, False), **dict.fromkeys(serving, True)}
        self._serving |= {WHOLE_SERVER: True, LIVENESS: True}
        self._changed = asyncio.Event()
        """Set, and replaced, at every change."""

    def show(self, abilities: Abilities) -> None:
        """Take over what the process can do now; nothing counts any more once it stops."""
        able = {
            TRAINING: abilities.trains,
            CORPORA: abilities.writes,
            MODELS: abilities.reads,
            TRANSLATION: abilities.translates,
        }
        news = {name: name in self._for and able[name] for name in ALL_SERVICES}
        news[WHOLE_SERVER] = all(news[name] for name in ROLE_SERVICES if name in self._for)
        if not self._stopping:
            self._change(news)

    def begin_stop(self) -> None:
        """Say NOT_SERVING from now on, but for liveness: a process that stops in order is not stuck."""
        self._stopping = True
        self._change(dict.fromkeys((WHOLE_SERVER, *ALL_SERVICES), False))

    def serving(self) -> Mapping[str, bool]:
        """Return which names are SERVING; safe to call from every thread."""
        return dict(self._serving)

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Context) -> health_pb2.HealthCheckResponse:
        """Tell the status of a service."""
        if request.service not in self._serving:
            await context.abort(grpc.StatusCode.NOT_FOUND)
        return self._status(request.service)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Context) -> None:
        """Tell the status of a service, then again when it has changed; what a slow reader has missed is left out."""
        told: health_pb2.HealthCheckResponse | None = None
        # Writing is waiting too: for a reader.
        async with self._shutdown.ends_wait():
            while True:
                status = self._status(request.service)
                if status != told:
                    await context.write(status)
                    told = status
                else:
                    await self._changed.wait()

    def _status(self, name: str) -> health_pb2.HealthCheckResponse:
        if name not in self._serving:
            return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)
        serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
        return health_pb2.HealthCheckResponse(status=serving if self._serving[name] else not_serving)

    def _change(self, news: Mapping[str, bool]) -> None:
        changed = {name: serving for name, serving in news.items() if self._serving[name] != serving}
        for name, serving in changed.items():
            _log.info("health of %s: %s", name or "the server", "SERVING" if serving else "NOT_SERVING")
        self._serving |= changed
        self._changed.set()
        self._changed = asyncio.Event()


@dataclass(frozen=True, kw_only=True)
class ProberConfig:
    """How often to look. A look that takes longer than `timeout_s` counts as failed, and no other is begun until it has
    ended. The process is unwell after `failures` looks in a row that found it so, and well after one."""

    interval_s: float = 1.0
    timeout_s: float = 12.0
    failures: int = 2


class HealthProber:
    """Looks at what the process can do, at a bounded cost, and keeps the health up to date."""

    def __init__(self, servicer: HealthServicer, readiness: Readiness, config: ProberConfig) -> None:
        self._servicer = servicer
        self._readiness = readiness
        self._config = config
        self._shown = Abilities()
        self._worse: list[Abilities] = []

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            looking = asyncio.ensure_future(self._readiness.look())
            done, _ = await asyncio.wait((looking,), timeout=self._config.timeout_s)
            if not done:
                _log.error("the data folder has not answered for %g s", self._config.timeout_s)
                self._worse = []
                self._show(self._readiness.judge(StoreState.LOST))
            self.take(await looking)
            await asyncio.sleep(self._config.interval_s)

    def take(self, found: Abilities) -> None:
        """Take what a look has found."""
        if found.covers(self._shown):
            self._worse = []
            self._show(found)
            return
        self._worse.append(found)
        if len(self._worse) >= self._config.failures:
            self._worse = []
            self._show(found)

    def _show(self, abilities: Abilities) -> None:
        self._shown = abilities
        self._servicer.show(abilities)


class ProbeServer:
    """Serves health and nothing else, in plain text; `start` and `stop` are called once each, from one event loop."""

    def __init__(
        self, servicer: HealthServicer, interceptors: Sequence[grpc.aio.ServerInterceptor], host: str, port: int
    ) -> None:
        """Store; port 0 takes a free one."""
        self._host = host
        self._port = port
        options = (
            # Without it a second server on the same port would silently get half of the calls.
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", PROBE_LIMITS.message_bytes),
            ("grpc.max_concurrent_streams", PROBE_LIMITS.health_calls + PROBE_LIMITS.health_watches),
            # A watcher whose machine is gone keeps its place no longer than 60 s + 20 s.
            ("grpc.keepalive_time_ms", 60_000),
            ("grpc.keepalive_timeout_ms", 20_000),
            ("grpc.max_allowed_incoming_connections", PROBE_LIMITS.connections),
            ("grpc.max_connection_idle_ms", _PROBE_IDLE_MS),
        )
        self._server = grpc.aio.server(interceptors=tuple(interceptors), options=options)
        health_pb2_grpc.add_HealthServicer_to_server(servicer, self._server)

    async def start(self) -> int:
        """Listen, and return the port; raises OSError if it cannot be had."""
        port = listen(self._server, self._host, self._port)
        await self._server.start()
        return port

    async def stop(self) -> None:
        """Stop at once: who asks later learns from that alone."""
        await self._server.stop(None)


def listen(server: grpc.aio.Server, host: str, port: int) -> int:
    """Give the server an address, and return its port; raises OSError if it cannot be had."""
    address = address_of(host, port)
    try:
        return server.add_insecure_port(address)
    except RuntimeError as error:
        raise OSError(f"cannot listen on {address}; is another server there?") from error


def address_of(host: str, port: int) -> str:
    """Return host and port as one word, as gRPC wants it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def check_health(address: str, service: str, timeout_s: float) -> str:
    """Ask a server about a service, "" is the whole; return its status, or why there is none.

    It is asked directly: what a proxy answers says nothing of the server's health.
    """
    with grpc.insecure_channel(address, (("grpc.enable_http_proxy", 0),)) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=timeout_s)
        except grpc.RpcError as error:
            code = error.code()
            return "SERVICE_UNKNOWN" if code is grpc.StatusCode.NOT_FOUND else f"no answer ({code.name})"
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))
