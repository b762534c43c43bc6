"""Around every call: domain errors become statuses, bugs become INTERNAL without insides, and all is counted."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractContextManager, aclosing
from functools import partial
from typing import Any, Final, NoReturn, TypeAlias

import grpc
from google.protobuf.message import DecodeError
from grpc_status import rpc_status

from ferryman_service.domain.errors import FerrymanError, InvalidRequest, Violation
from ferryman_service.domain.os_errors import domain_error
from ferryman_service.observability.rpc import CallMetrics, RpcMetrics
from ferryman_service.rpc.call_scope import DEFAULT_SCOPES, CallScope, CallScopes
from ferryman_service.rpc.errors import internal_status, status_code, to_status
from ferryman_service.rpc.message_counts import counting_messages
from ferryman_service.rpc.messages import Messages
from ferryman_service.rpc.request_limits import DEFAULT_LIMITS, CallGate, RequestLimits
from ferryman_service.rpc.shutdown import Shutdown

_OURS: Final = "ferryman.v1."
_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
_Behaviour: TypeAlias = "Callable[[Any, _Context], Any]"
_OpenScope: TypeAlias = "Callable[[_Context], AbstractContextManager[CallScope]]"

_MAKERS: Final[Mapping[str, Callable[..., _Handler]]] = {
    "unary": grpc.stream_unary_rpc_method_handler,
    "client_stream": grpc.stream_unary_rpc_method_handler,
    "server_stream": grpc.stream_stream_rpc_method_handler,
    "bidi_stream": grpc.stream_stream_rpc_method_handler,
}


class CallInterceptor(grpc.aio.ServerInterceptor):
    """The only interceptor: its order inside a call is its own."""

    def __init__(
        self,
        metrics: RpcMetrics,
        shutdown: Shutdown,
        scopes: CallScopes = DEFAULT_SCOPES,
        limits: RequestLimits = DEFAULT_LIMITS,
        messages: Messages | None = None,
    ) -> None:
        """Store; `messages` None: bounds and budgets are the default ones."""
        self._metrics = metrics
        self._shutdown = shutdown
        self._scopes = scopes
        self._gate = CallGate(limits, metrics)
        self._messages = Messages() if messages is None else messages

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler | None:
        """Wrap the handler of a call; an unknown method has none, and grpc answers it."""
        handler = await continuation(handler_call_details)
        if handler is None:
            self._metrics.unknown_method()
            return None
        service, _, method = handler_call_details.method.lstrip("/").partition("/")
        kind = _kind(handler)
        behaviour: Any = handler.unary_unary or handler.stream_unary or handler.unary_stream or handler.stream_stream
        assert behaviour is not None, "a handler has a behaviour"
        respond = _streaming(behaviour) if handler.response_streaming else behaviour
        # Also because grpc answers a request that it cannot read with UNKNOWN and the parser's words.
        respond = self._messages.of_bytes(handler_call_details.method, handler, respond)
        calls = self._metrics.calls_of(service, method, kind)
        respond = counting_messages(
            respond,
            calls,
            request_streaming=handler.request_streaming,
            response_streaming=handler.response_streaming,
        )
        respond = self._gate.guard(respond, handler_call_details.method, handler)
        respond = _ending(respond, self._shutdown, is_ours=service.startswith(_OURS))
        open_scope = partial(self._scopes.open, service, method)
        return _MAKERS[kind](
            _around(respond, calls, open_scope),
            request_deserializer=self._gate.reader(handler_call_details.method),
            response_serializer=None,
        )


def _kind(handler: _Handler) -> str:
    if handler.response_streaming:
        return "bidi_stream" if handler.request_streaming else "server_stream"
    return "client_stream" if handler.request_streaming else "unary"


def _streaming(behaviour: _Behaviour) -> _Behaviour:
    """Return the behaviour as a coroutine function that writes its responses.

    grpc leaves the async generator of a cancelled call to the garbage collector; here it is closed at once.
    """
    if inspect.iscoroutinefunction(behaviour):
        return behaviour

    async def respond(request: Any, context: _Context) -> None:  # noqa: ANN401 (any message)
        async with aclosing(behaviour(request, context)) as responses:
            async for response in responses:
                await context.write(response)

    return respond


def _ending(respond: _Behaviour, shutdown: Shutdown, *, is_ours: bool) -> _Behaviour:
    async def respond_in_time(request: Any, context: _Context) -> Any:  # noqa: ANN401 (any message)
        async with shutdown.ends_call():
            if is_ours:
                await shutdown.let_in()
            return await respond(request, context)

    return respond_in_time


def _around(respond: _Behaviour, calls: CallMetrics, open_scope: _OpenScope) -> _Behaviour:
    async def call(request: Any, context: _Context) -> Any:  # noqa: ANN401 (any message)
        with open_scope(context) as scope:
            return await call_in(scope, request, context)

    async def call_in(scope: CallScope, request: Any, context: _Context) -> Any:  # noqa: ANN401
        began_s = time.monotonic()
        calls.started()
        code = grpc.StatusCode.OK
        try:
            return await respond(request, context)
        except asyncio.CancelledError:
            code = grpc.StatusCode.DEADLINE_EXCEEDED if context.time_remaining() == 0 else grpc.StatusCode.CANCELLED
            raise
        except grpc.aio.AbortError:
            code = context.code()
            raise
        except grpc.aio.BaseError:
            # The caller is gone, or the server has stopped: there is nobody to tell.
            code = grpc.StatusCode.CANCELLED
            raise
        except FerrymanError as error:
            code = status_code(error)
            await _abort_with_error(error, context, scope)
        except DecodeError:
            code = grpc.StatusCode.INVALID_ARGUMENT
            await _abort_with_error(_malformed(), context, scope)
        except Exception as error:  # noqa: BLE001 (the outermost place: every error must become a status)
            if isinstance(error, OSError) and (translated := domain_error(error)) is not None:
                code = status_code(translated)
                scope.machine_failed(error)
                await _abort_with_error(translated, context, scope)
            code = grpc.StatusCode.INTERNAL
            scope.bug("failed with an error that is not its caller's", error)
            await scope.abort(context, rpc_status.to_status(internal_status()))
        finally:
            seconds = time.monotonic() - began_s
            calls.handled(code.name, seconds)
            scope.ended(code, seconds)

    return call


def _malformed() -> InvalidRequest:
    text = "cannot be read as a message of this method: is its sender's contract the same as ours?"
    return InvalidRequest([Violation(field="request", description=text, reason="MALFORMED")])


async def _abort_with_error(error: FerrymanError, context: _Context, scope: CallScope) -> NoReturn:
    if status_code(error) is grpc.StatusCode.INTERNAL:
        scope.bug(f"{error.reason} must not leave the service", error)
        await scope.abort(context, rpc_status.to_status(internal_status()))
    await scope.abort(context, rpc_status.to_status(to_status(error)), error)
    raise AssertionError("abort always raises")
