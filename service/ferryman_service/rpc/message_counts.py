"""Counting a call's messages, whichever way its handler reads and writes them."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Callable
from typing import Any, TypeAlias

import grpc

from ferryman_service.observability.rpc import CallMetrics

_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
_Behaviour: TypeAlias = "Callable[[Any, _Context], Any]"


def counting_messages(
    respond: _Behaviour, calls: CallMetrics, *, request_streaming: bool, response_streaming: bool
) -> _Behaviour:
    """Return the behaviour, a coroutine function, as one whose messages are counted."""

    async def count(request: Any, context: _Context) -> Any:  # noqa: ANN401 (any message)
        if request_streaming:
            request = _Received(request, calls)
        else:
            calls.received()
        if response_streaming:
            return await respond(request, _Sending(context, calls))  # type: ignore[arg-type]
        response = await respond(request, context)
        calls.sent()
        return response

    return count


class _Received:
    """A caller's messages, each counted as it is read."""

    def __init__(self, requests: AsyncIterable[Any], calls: CallMetrics) -> None:
        self._requests = aiter(requests)
        self._calls = calls

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:  # noqa: ANN401 (any message)
        request = await anext(self._requests)
        self._calls.received()
        return request


class _Sending:
    """A context whose `write` counts; all else is the context's own."""

    def __init__(self, context: _Context, calls: CallMetrics) -> None:
        self._context = context
        self._calls = calls

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 (whatever the context has)
        return getattr(self._context, name)

    async def write(self, message: Any) -> None:  # noqa: ANN401 (any message)
        await self._context.write(message)
        self._calls.sent()
