"""The gRPC server: services, health, reflection, limits, and an orderly end."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import grpc
from grpc_health.v1 import health, health_pb2_grpc

from ferryman.v1 import (
    corpus_pb2_grpc,
    model_pb2_grpc,
    training_pb2_grpc,
    translation_pb2_grpc,
)
from ferryman_service.rpc.answer_budget import LARGEST_ANSWER_BYTES
from ferryman_service.rpc.corpora import CorpusServicer
from ferryman_service.rpc.health import ALL_SERVICES, HealthServicer, listen
from ferryman_service.rpc.interceptors import CallInterceptor
from ferryman_service.rpc.models import ModelServicer
from ferryman_service.rpc.reflection import add_reflection
from ferryman_service.rpc.request_limits import DEFAULT_LIMITS, RequestLimits
from ferryman_service.rpc.shutdown import Shutdown
from ferryman_service.rpc.training import TrainingServicer
from ferryman_service.rpc.translation import TranslationServicer

_GOODBYE_S: Final = 0.05
"""What the news that a connection takes no more calls needs to reach the callers."""
_IDLE_MS: Final = 300_000
_HANDSHAKE_MS: Final = 20_000
_LAST_WORDS_S: Final = 0.5
"""What calls get after their time is up, to tell their callers so."""


@dataclass(frozen=True, kw_only=True)
class RpcConfig:
    """Where to listen, and the limits of a connection; a `max_connection_age_s` of 0 is none. New calls are held for
    `hold_s` before connections are closed, see `Shutdown.let_in`."""

    host: str = "127.0.0.1"
    port: int = 50051
    reflection: bool = True
    max_connection_age_s: float = 0.0
    max_connection_age_grace_s: float = 3600.0
    hold_s: float = 0.25
    limits: RequestLimits = DEFAULT_LIMITS
    max_send_bytes: int = LARGEST_ANSWER_BYTES
    max_metadata_bytes: int = 16 * 2**10

    def options(self) -> Sequence[tuple[str, int]]:
        """Return the channel arguments of the server."""
        # gRPC spreads the age by a tenth, so that connections that began together do not end together.
        ages_ms = {
            "grpc.max_connection_age_ms": round(self.max_connection_age_s * 1000),
            "grpc.max_connection_age_grace_ms": round(self.max_connection_age_grace_s * 1000),
        }
        return (
            *(ages_ms.items() if self.max_connection_age_s else ()),
            # Without this a second server on the same port would silently get half of the calls.
            ("grpc.so_reuseport", 0),
            # Per server: gRPC knows no limit per method there.
            ("grpc.max_receive_message_length", self.limits.message_bytes),
            ("grpc.max_send_message_length", self.max_send_bytes),
            # A message that nobody reads yet takes 64 KiB. With the probe, windows grow to megabytes on a fast network.
            ("grpc.http2.bdp_probe", 0),
            # Of one connection. A client that knows it holds further calls back, others get no answer to theirs.
            ("grpc.max_concurrent_streams", self.limits.calls),
            # Further ones are closed. Each takes an open file.
            ("grpc.max_allowed_incoming_connections", self.limits.connections),
            ("grpc.max_metadata_size", self.max_metadata_bytes),
            # A connection without a call, or that never becomes one of HTTP/2, keeps its open file no longer.
            ("grpc.max_connection_idle_ms", _IDLE_MS),
            ("grpc.server_handshake_timeout_ms", _HANDSHAKE_MS),
            # A caller whose machine is gone says no goodbye: its streams end after 60 s + 20 s.
            ("grpc.keepalive_time_ms", 60_000),
            ("grpc.keepalive_timeout_ms", 20_000),
            # Clients may ping every 10 s, which keeps quiet metrics streams alive through proxies.
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            ("grpc.keepalive_permit_without_calls", 1),
        )


@dataclass(frozen=True, kw_only=True)
class Servicers:
    """One per service of the contract."""

    training: TrainingServicer
    corpora: CorpusServicer
    models: ModelServicer
    translation: TranslationServicer


class RpcServer:
    """`start` and `stop` are called once each, from one event loop."""

    def __init__(
        self,
        servicers: Servicers,
        health_servicer: HealthServicer,
        interceptor: CallInterceptor,
        shutdown: Shutdown,
        config: RpcConfig,
    ) -> None:
        self._config = config
        self._shutdown = shutdown
        self._server = grpc.aio.server(interceptors=(interceptor,), options=config.options())
        training_pb2_grpc.add_TrainingServiceServicer_to_server(servicers.training, self._server)
        corpus_pb2_grpc.add_CorpusServiceServicer_to_server(servicers.corpora, self._server)
        model_pb2_grpc.add_ModelServiceServicer_to_server(servicers.models, self._server)
        translation_pb2_grpc.add_TranslationServiceServicer_to_server(servicers.translation, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(health_servicer, self._server)
        if config.reflection:
            add_reflection(self._server, (*ALL_SERVICES, health.SERVICE_NAME))

    async def start(self) -> int:
        """Listen, and return the port; raises OSError if it cannot be had."""
        port = listen(self._server, self._config.host, self._config.port)
        await self._server.start()
        return port

    async def stop(self, grace_s: float, hurry: asyncio.Event | None = None) -> bool:
        """Take no more calls, end live streams, let the other calls end within the grace, or until `hurry` is set, then
        end what is left. Whatever is ended, its caller is told UNAVAILABLE, and to call again.

        Return whether all has ended: what a thread is stuck in cannot be ended.
        """
        self._shutdown.begin()
        hurrying = asyncio.ensure_future((hurry or asyncio.Event()).wait())
        held_s = min(self._config.hold_s, grace_s)
        await asyncio.wait((hurrying,), timeout=held_s)
        stopping = asyncio.ensure_future(self._server.stop(grace_s - held_s + _LAST_WORDS_S))
        await asyncio.wait((stopping,), timeout=_GOODBYE_S)
        self._shutdown.answer_held()
        await asyncio.wait((stopping, hurrying), timeout=grace_s - held_s, return_when=asyncio.FIRST_COMPLETED)
        hurrying.cancel()
        self._shutdown.give_up()
        done, _ = await asyncio.wait((stopping,), timeout=2 * _LAST_WORDS_S)
        return bool(done)
