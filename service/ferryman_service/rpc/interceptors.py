"""Around every call: domain errors become statuses, bugs become INTERNAL without insides, and all is counted."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn

import grpc
from grpc_status import rpc_status

from ferryman_service.domain.errors import Cancelled, FerrymanError
from ferryman_service.observability.rpc import CallMetrics, RpcMetrics
from ferryman_service.rpc.errors import internal_status, status_code, to_status

_log = logging.getLogger(__name__)
_Handler = grpc.RpcMethodHandler[Any, Any]
_Context = grpc.aio.ServicerContext[Any, Any]


class CallInterceptor(grpc.aio.ServerInterceptor):
    """The only interceptor: its order inside a call is its own."""

    def __init__(self, metrics: RpcMetrics) -> None:
        self._metrics = metrics

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler | None:
        """Wrap the handler of a call; an unknown method has none, and grpc answers it."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        service, _, method = handler_call_details.method.lstrip("/").partition("/")
        kind = _kind(handler)
        calls = self._metrics.calls_of(service, method, kind)
        wrap = _wrap_streaming if handler.response_streaming else _wrap_unary
        make = {
            "unary": grpc.unary_unary_rpc_method_handler,
            "client_stream": grpc.stream_unary_rpc_method_handler,
            "server_stream": grpc.unary_stream_rpc_method_handler,
            "bidi_stream": grpc.stream_stream_rpc_method_handler,
        }[kind]
        behaviour = handler.unary_unary or handler.stream_unary or handler.unary_stream or handler.stream_stream
        return make(
            wrap(behaviour, calls),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )


def _kind(handler: _Handler) -> str:
    if handler.response_streaming:
        return "bidi_stream" if handler.request_streaming else "server_stream"
    return "client_stream" if handler.request_streaming else "unary"


def _wrap_unary(behaviour: Any, calls: CallMetrics) -> Callable[[Any, _Context], Awaitable[Any]]:  # noqa: ANN401
    async def call(request: Any, context: _Context) -> Any:  # noqa: ANN401 - any message
        with _Counted(calls) as counted:
            try:
                response = await behaviour(request, context)
            except Exception as error:  # noqa: BLE001 - the outermost place: every error must become a status
                await _abort(error, context, counted)
            counted.end(grpc.StatusCode(context.code()) if context.code() else grpc.StatusCode.OK)
            return response

    return call


def _wrap_streaming(behaviour: Any, calls: CallMetrics) -> Callable[[Any, _Context], AsyncIterator[Any]]:  # noqa: ANN401
    async def call(request: Any, context: _Context) -> AsyncIterator[Any]:  # noqa: ANN401 - any message
        with _Counted(calls) as counted:
            try:
                async for response in behaviour(request, context):
                    yield response
            except Exception as error:  # noqa: BLE001 - the outermost place: every error must become a status
                await _abort(error, context, counted)
            counted.end(grpc.StatusCode.OK)

    return call


class _Counted:
    """Counts a call when it begins and when it ends. One that is left without a word was cancelled by its caller."""

    def __init__(self, calls: CallMetrics) -> None:
        self._calls = calls
        self._began_s = 0.0
        self._code = grpc.StatusCode.CANCELLED

    def __enter__(self) -> _Counted:
        self._began_s = time.monotonic()
        self._calls.started()
        return self

    def end(self, code: grpc.StatusCode) -> None:
        self._code = code

    def __exit__(self, *_: object) -> None:
        self._calls.handled(self._code.name, time.monotonic() - self._began_s)


async def _abort(error: Exception, context: _Context, counted: _Counted) -> NoReturn:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if isinstance(error, FerrymanError):
        counted.end(status_code(error))
        if not isinstance(error, Cancelled):
            _log.info("%s: %s", error.reason, error.message)
        status = to_status(error)
    else:
        counted.end(grpc.StatusCode.INTERNAL)
        _log.error("a bug", exc_info=error)
        status = internal_status()
    await context.abort_with_status(rpc_status.to_status(status))
    raise AssertionError("abort_with_status always raises")
