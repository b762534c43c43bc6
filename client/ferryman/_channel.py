"""How both clients set up their channel."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, Final

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
    "ferryman.v1.TranslationService": ("Translate",),
}
_RETRY_POLICY: Final = {
    "maxAttempts": 4,
    "initialBackoff": "0.1s",
    "maxBackoff": "1s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE"],
}


def channel_options(extra: ChannelOptions) -> list[tuple[str, Any]]:
    """Return the options of a channel; the caller's come last, and the last one counts."""
    return [
        ("grpc.service_config", _service_config()),
        ("grpc.primary_user_agent", f"ferryman/{version('ferryman')}"),
        ("grpc.max_receive_message_length", 64 * 1024 * 1024),
        # A dead peer is noticed within 30 s + 10 s, also by a stream that says nothing.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        # After an outage the channel looks for the server every second or two, not every two minutes.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 1_000),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        *extra,
    ]


def _service_config() -> str:
    names = [{"service": service, "method": method} for service, methods in _RETRIED.items() for method in methods]
    return json.dumps({"methodConfig": [{"name": names, "retryPolicy": _RETRY_POLICY}]})
