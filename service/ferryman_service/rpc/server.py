"""The gRPC server: services, health, reflection, limits, and an orderly end."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Final

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from ferryman.v1 import (
    corpus_pb2,
    corpus_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    training_pb2,
    training_pb2_grpc,
    translation_pb2,
    translation_pb2_grpc,
)
from ferryman_service.rpc.corpora import CorpusServicer
from ferryman_service.rpc.interceptors import CallInterceptor
from ferryman_service.rpc.models import ModelServicer
from ferryman_service.rpc.shutdown import Shutdown
from ferryman_service.rpc.training import TrainingServicer
from ferryman_service.rpc.translation import TranslationServicer

TRAINING: Final[str] = training_pb2.DESCRIPTOR.services_by_name["TrainingService"].full_name
CORPORA: Final[str] = corpus_pb2.DESCRIPTOR.services_by_name["CorpusService"].full_name
MODELS: Final[str] = model_pb2.DESCRIPTOR.services_by_name["ModelService"].full_name
TRANSLATION: Final[str] = translation_pb2.DESCRIPTOR.services_by_name["TranslationService"].full_name
ALL_SERVICES: Final = (TRAINING, CORPORA, MODELS, TRANSLATION)


@dataclass(frozen=True, kw_only=True)
class RpcConfig:
    """Where to listen, and the limits of a connection. `serving` names the services whose health is SERVING."""

    host: str = "127.0.0.1"
    port: int = 50051
    reflection: bool = True
    serving: Collection[str] = ALL_SERVICES
    max_receive_bytes: int = 16 * 2**20
    max_send_bytes: int = 64 * 2**20
    max_concurrent_streams: int = 1000
    max_metadata_bytes: int = 16 * 2**10

    def options(self) -> Sequence[tuple[str, int]]:
        """Return the channel arguments of the server."""
        return (
            # Without this a second server on the same port would silently get half of the calls.
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", self.max_receive_bytes),
            ("grpc.max_send_message_length", self.max_send_bytes),
            ("grpc.max_concurrent_streams", self.max_concurrent_streams),
            ("grpc.max_metadata_size", self.max_metadata_bytes),
            # A caller whose machine is gone says no goodbye: its streams end after 60 s + 20 s.
            ("grpc.keepalive_time_ms", 60_000),
            ("grpc.keepalive_timeout_ms", 20_000),
            # Clients may ping every 10 s, which keeps quiet metrics streams alive through proxies.
            ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
            ("grpc.keepalive_permit_without_calls", 1),
        )


class HealthServicer(health.aio.HealthServicer):  # type: ignore[misc]  # its package has no types
    """grpc.health.v1, whose watchers do not hold up the end of the server."""

    def __init__(self, shutdown: Shutdown) -> None:
        super().__init__()
        self._shutdown = shutdown

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """Tell the status of a service each time it changes."""
        async with self._shutdown.ends_wait():
            await super().Watch(request, context)


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
        self, servicers: Servicers, interceptor: CallInterceptor, shutdown: Shutdown, config: RpcConfig
    ) -> None:
        self._config = config
        self._shutdown = shutdown
        self._health = HealthServicer(shutdown)
        self._server = grpc.aio.server(interceptors=(interceptor,), options=config.options())
        training_pb2_grpc.add_TrainingServiceServicer_to_server(servicers.training, self._server)
        corpus_pb2_grpc.add_CorpusServiceServicer_to_server(servicers.corpora, self._server)
        model_pb2_grpc.add_ModelServiceServicer_to_server(servicers.models, self._server)
        translation_pb2_grpc.add_TranslationServiceServicer_to_server(servicers.translation, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if config.reflection:
            names = (*ALL_SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._server)

    async def start(self) -> int:
        """Listen, and return the port; raises OSError if it cannot be had."""
        host = f"[{self._config.host}]" if ":" in self._config.host else self._config.host
        address = f"{host}:{self._config.port}"
        try:
            port = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {address}; is another server there?") from error
        for name in ("", *ALL_SERVICES):
            serving = not name or name in self._config.serving
            status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
            await self._health.set(name, status)
        await self._server.start()
        return port

    async def stop(self, grace_s: float) -> None:
        """Tell health checks, cut live streams short, let calls in flight end within the grace, then stop."""
        await self._health.enter_graceful_shutdown()
        self._shutdown.begin()
        await self._server.stop(grace_s)


def check_health(address: str, timeout_s: float) -> bool:
    """Ask a server whether it serves as a whole."""
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
