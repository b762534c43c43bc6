"""How both clients set up their channel."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, Final

from ferryman._checks import LARGEST_REQUEST_BYTES, is_loopback

ChannelOptions = Sequence[tuple[str, Any]]

# Without what deletes and unloads: repeated after an answer that was lost, it would say that there is nothing.
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
        "DownloadModel",  # only until its first message has come
        "LoadModel",
        "ListLoadedModels",
    ),
    "ferryman.v1.TranslationService": (
        "Translate",
        "StreamTranslate",  # only until the server has accepted it: after that the client itself takes it up again
    ),
}
_RETRY_POLICY: Final = {
    "maxAttempts": 4,
    "initialBackoff": "0.1s",
    "maxBackoff": "1s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE"],
}
# Each failed attempt takes a token, each success gives one half back, and below half of them nothing is repeated: the
# callers of a server that dies are all repeated elsewhere, the callers of a service that is down do not knock at it
# four times each.
_RETRY_THROTTLING: Final = {"maxTokens": 1000, "tokenRatio": 0.5}


def channel_options(extra: ChannelOptions, target: str = "") -> list[tuple[str, Any]]:
    """Return the options of a channel to the target; the caller's replace those of the same name."""
    # gRPC would ask the proxy of http_proxy for this machine too, where that finds another.
    direct = {"grpc.enable_http_proxy": 0} if is_loopback(target) else {}
    return list(({**_defaults(), **direct, **dict(extra)}).items())


def _defaults() -> dict[str, Any]:
    return {
        "grpc.service_config": _service_config(),
        "grpc.primary_user_agent": f"ferryman/{version('ferryman')}",
        "grpc.max_receive_message_length": 64 * 1024 * 1024,
        # A request that does not fit in here is not repeated.
        "grpc.per_rpc_retry_buffer_size": LARGEST_REQUEST_BYTES,
        # A dead peer is noticed within 30 s + 10 s, also by a quiet call. A server allows a ping every 10 s.
        "grpc.keepalive_time_ms": 30_000,
        "grpc.keepalive_timeout_ms": 10_000,
        # A ping that measures the bandwidth may be under way, and keepalive waits for it.
        "grpc.http2.ping_timeout_ms": 10_000,
        "grpc.http2.max_pings_without_data": 0,
        # After an outage the channel looks for the server every second or two, not every two minutes, also where its
        # name leads to by then.
        "grpc.initial_reconnect_backoff_ms": 100,
        "grpc.min_reconnect_backoff_ms": 1_000,
        "grpc.max_reconnect_backoff_ms": 2_000,
        "grpc.dns_min_time_between_resolutions_ms": 2_000,
    }


def _service_config() -> str:
    names = [{"service": service, "method": method} for service, methods in _RETRIED.items() for method in methods]
    return json.dumps(
        {
            # Every address behind the name gets its share, not the first one everything.
            "loadBalancingConfig": [{"round_robin": {}}],
            "methodConfig": [{"name": names, "retryPolicy": _RETRY_POLICY}],
            "retryThrottling": _RETRY_THROTTLING,
        }
    )
