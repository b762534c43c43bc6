"""A client span for every call, if the application traces with OpenTelemetry.

An application that traces has imported opentelemetry.trace. Otherwise this module imports nothing and does nothing.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from typing import Any, Final, TypeAlias

import grpc

from ferryman.errors import FerrymanError

Metadata: TypeAlias = "tuple[tuple[str, str], ...] | None"
_API: Final = "opentelemetry.trace"


class CallSpan:
    """The span of one call. `metadata` carries the trace context to the server; None without tracing."""

    def __init__(self, metadata: Metadata = None) -> None:
        self.metadata = metadata
        self.code = grpc.StatusCode.OK
        self.has_failed = False

    def record_failure(self, error: Any) -> None:  # noqa: ANN401 (a grpc.RpcError is a Call only by convention)
        """Record the failure of the call, for callers that catch the error inside the block."""
        code = error.code() if callable(error.code) else error.code
        self.code = code if isinstance(code, grpc.StatusCode) else grpc.StatusCode.UNKNOWN
        self.has_failed = True


@contextmanager
def call_span(path: str) -> Iterator[CallSpan]:
    """Trace the block, a call of the method `path`, as a child of the current span."""
    api: Any = sys.modules.get(_API)
    if api is None:
        yield CallSpan()
        return
    from opentelemetry import propagate

    name = path.lstrip("/")
    service, _, method = name.partition("/")
    attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": method}
    # Never the current span: the caller leaves and reenters the block of a stream with each item.
    span = api.get_tracer("ferryman", _release()).start_span(name, kind=api.SpanKind.CLIENT, attributes=attributes)
    carrier: dict[str, str] = {}
    propagate.inject(carrier, api.set_span_in_context(span))
    call = CallSpan(tuple(carrier.items()))
    try:
        yield call
    except (GeneratorExit, asyncio.CancelledError):
        call.code = grpc.StatusCode.CANCELLED  # the caller stopped early, which is not a failure
        raise
    except (FerrymanError, grpc.RpcError) as error:
        call.record_failure(error)
        raise
    finally:
        span.set_attribute("rpc.grpc.status_code", call.code.value[0])
        if call.has_failed:
            span.set_attribute("error.type", call.code.name)
            span.set_status(api.Status(api.StatusCode.ERROR))
        span.end()


@cache
def _release() -> str:
    return version("ferryman")
