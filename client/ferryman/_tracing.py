"""A span for every call, if the program that uses the client traces with OpenTelemetry.

Who traces has imported opentelemetry.trace to say so. Nothing is imported here before that, and nothing is done.
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
    """What is around one call. `metadata` tells the server of it; None if nobody traces."""

    def __init__(self, metadata: Metadata = None) -> None:
        self.metadata = metadata
        self.code = grpc.StatusCode.OK
        self.has_failed = False

    def failed(self, error: Any) -> None:  # noqa: ANN401 (a grpc.RpcError is a Call only by convention)
        """Note how the call has failed; for who catches the error inside the block."""
        code = error.code() if callable(error.code) else error.code
        self.code = code if isinstance(code, grpc.StatusCode) else grpc.StatusCode.UNKNOWN
        self.has_failed = True


@contextmanager
def call_span(path: str) -> Iterator[CallSpan]:
    """Time the block, a call of the method with that path, as a child of the span around it."""
    api: Any = sys.modules.get(_API)
    if api is None:
        yield CallSpan()
        return
    from opentelemetry import propagate

    name = path.lstrip("/")
    service, _, method = name.partition("/")
    attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": method}
    # It is nobody's current span: a stream's block is left and entered again with each item that the caller takes.
    span = api.get_tracer("ferryman", _release()).start_span(name, kind=api.SpanKind.CLIENT, attributes=attributes)
    carrier: dict[str, str] = {}
    propagate.inject(carrier, api.set_span_in_context(span))
    ours = CallSpan(tuple(carrier.items()))
    try:
        yield ours
    except (GeneratorExit, asyncio.CancelledError):
        ours.code = grpc.StatusCode.CANCELLED  # the caller wants no more: no failure
        raise
    except (FerrymanError, grpc.RpcError) as error:
        ours.failed(error)
        raise
    finally:
        span.set_attribute("rpc.grpc.status_code", ours.code.value[0])
        if ours.has_failed:
            span.set_attribute("error.type", ours.code.name)
            span.set_status(api.Status(api.StatusCode.ERROR))
        span.end()


@cache
def _release() -> str:
    return version("ferryman")
