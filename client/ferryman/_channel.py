"""The gRPC channel options of both clients: retries, keepalive, reconnecting."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, Final

from ferryman._checks import LARGEST_REQUEST_BYTES, is_loopback

ChannelOptions = Sequence[tuple[str, Any]]

# Deletions and UnloadModel are missing: repeated after a lost response, they would report that nothing exists.
_RETRIED: Final = {
    "ferryman.v1.TrainingService": (
        "StartTraining",  # idempotent by its request_id, which the client always sends
        "GetLRSchedule",
        "GetTrainingRun",
        "ListTrainingRuns",
        "CancelTraining",
        "PauseTraining",
        "ResumeTraining",
        "ListCheckpoints",
    ),
    "ferryman.v1.CorpusService": ("GetCorpus", "ListCorpora"),
    "ferryman.v1.ModelService": (
        "ListModels",
        "GetModel",
        "SetModelAlias",
        "DownloadModel",  # only until its first response
        "LoadModel",
        "ListLoadedModels",
    ),
    "ferryman.v1.TranslationService": (
        "Translate",
        "StreamTranslate",  # only until the server has accepted it; later the client itself resumes it
    ),
}
_RETRY_POLICY: Final = {
    "maxAttempts": 4,
    "initialBackoff": "0.1s",
    "maxBackoff": "1s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE"],
}
# A failed attempt costs a token and a success returns half a token; below half of the tokens nothing is retried. So the
# calls of a server that dies are retried elsewhere, but an outage of the whole service is not multiplied by four.
_RETRY_THROTTLING: Final = {"maxTokens": 1000, "tokenRatio": 0.5}


def channel_options(extra: ChannelOptions, target: str = "") -> list[tuple[str, Any]]:
    """Return the options of a channel to the target; options in `extra` replace the defaults."""
    # gRPC would use the proxy in http_proxy for loopback addresses too, and reach the proxy's own machine.
    direct = {"grpc.enable_http_proxy": 0} if is_loopback(target) else {}
    return list(({**_defaults(), **direct, **dict(extra)}).items())


def _defaults() -> dict[str, Any]:
    return {
        "grpc.service_config": _service_config(),
        "grpc.primary_user_agent": f"ferryman/{version('ferryman')}",
        "grpc.max_receive_message_length": 64 * 1024 * 1024,
        # A request that does not fit into this buffer is not retried.
        "grpc.per_rpc_retry_buffer_size": LARGEST_REQUEST_BYTES,
        # Detects a dead peer within 30 s + 10 s, also during a quiet call. The server allows a ping every 10 s.
        "grpc.keepalive_time_ms": 30_000,
        "grpc.keepalive_timeout_ms": 10_000,
        # Keepalive waits for a bandwidth ping in flight.
        "grpc.http2.ping_timeout_ms": 10_000,
        "grpc.http2.max_pings_without_data": 0,
        # After an outage the channel reconnects, and resolves the name, every second or two, not every two minutes.
        "grpc.initial_reconnect_backoff_ms": 100,
        "grpc.min_reconnect_backoff_ms": 1_000,
        "grpc.max_reconnect_backoff_ms": 2_000,
        "grpc.dns_min_time_between_resolutions_ms": 2_000,
    }


def _service_config() -> str:
    names = [{"service": service, "method": method} for service, methods in _RETRIED.items() for method in methods]
    return json.dumps(
        {
            # Spread calls over every address of the name.
            "loadBalancingConfig": [{"round_robin": {}}],
            "methodConfig": [{"name": names, "retryPolicy": _RETRY_POLICY}],
            "retryThrottling": _RETRY_THROTTLING,
        }
    )
