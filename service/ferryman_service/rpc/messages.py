"""Between a call's bytes and its messages: bounds, a budget, and threads for what is large.

gRPC would parse requests and serialise answers in the event loop, where whatever is large holds up all other calls. So
handlers are given to gRPC without their serialisers, as handlers of bytes.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Callable, Mapping
from functools import partial
from typing import Any, Final, TypeAlias

import grpc
from google.protobuf.message import Message

from ferryman_service.application.paging import PAGE_BYTES
from ferryman_service.domain.threads import Threads
from ferryman_service.rpc.answer_budget import (
    LARGEST_ANSWER_BYTES,
    SMALL_ANSWER_BYTES,
    AnswerBudget,
    Booking,
    answer_too_large,
)
from ferryman_service.rpc.bounds import RequestBounds, element_bounds

MESSAGE_THREADS: Final = 2
"""Few: while one of them runs, the event loop waits for up to 5 ms whenever it wants to go on."""
_SMALL_REQUEST_BYTES: Final = 64 * 2**10
_MARGIN_BYTES: Final = 2**16

LARGE_ANSWERS: Final[Mapping[str, int]] = {
    "/ferryman.v1.CorpusService/ListCorpora": PAGE_BYTES + _MARGIN_BYTES,
    "/ferryman.v1.ModelService/ListModels": PAGE_BYTES + _MARGIN_BYTES,
    "/ferryman.v1.TrainingService/ListTrainingRuns": PAGE_BYTES + _MARGIN_BYTES,
    "/ferryman.v1.TrainingService/GetLRSchedule": 3 * 2**20,
}
"""How large the answers may be that are booked before their calls begin."""

_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
_Behaviour: TypeAlias = "Callable[[Any, _Context], Any]"

DEFAULT_THREADS: Final = Threads(MESSAGE_THREADS, "messages")


class Messages:
    """One per server; belongs to its event loop. `threads` parse, build and serialise what is large."""

    def __init__(
        self,
        bounds: RequestBounds | None = None,
        answers: AnswerBudget | None = None,
        threads: Threads = DEFAULT_THREADS,
    ) -> None:
        self._bounds = RequestBounds(element_bounds()) if bounds is None else bounds
        self._answers = AnswerBudget() if answers is None else answers
        self._threads = threads

    def of_bytes(self, method: str, handler: _Handler, respond: _Behaviour) -> _Behaviour:
        """Return the behaviour of a handler, a coroutine function of messages, as one of bytes."""
        if handler.response_streaming:
            respond = self._writing(respond)
        else:
            respond = self._answering(respond, LARGE_ANSWERS.get(method, 0))
        kind = getattr(handler.request_deserializer, "__self__", None)
        assert isinstance(kind, type) and issubclass(kind, Message), "generated code parses by Message.FromString"
        read = partial(self._read, kind)
        return _reading_all(respond, read) if handler.request_streaming else _reading(respond, read)

    async def _read(self, kind: type[Message], data: bytes) -> Message:
        if len(data) <= _SMALL_REQUEST_BYTES:
            return self._bounds.read(kind, data)
        return await self._threads.run(self._bounds.read, kind, data)

    def _answering(self, respond: _Behaviour, largest_bytes: int) -> _Behaviour:
        async def answer(request: Any, context: _Context) -> bytes:  # noqa: ANN401 (any message)
            booking = None
            if largest_bytes:
                booking = await self._answers.book(context.peer(), largest_bytes)
                context.add_done_callback(_releasing(booking))
            response: Message = await respond(request, context)
            size_bytes = _checked_size(response)
            if booking is not None:
                booking.settle(size_bytes)
            elif size_bytes > SMALL_ANSWER_BYTES:
                late = await self._answers.book(context.peer(), size_bytes)
                context.add_done_callback(_releasing(late))
            return await self._serialised(response, size_bytes)

        return answer

    def _writing(self, respond: _Behaviour) -> _Behaviour:
        async def write(request: Any, context: _Context) -> None:  # noqa: ANN401 (any message)
            await respond(request, _Writing(context, self._write))  # type: ignore[arg-type]

        return write

    async def _write(self, context: _Context, response: Message) -> None:
        size_bytes = _checked_size(response)
        if size_bytes <= SMALL_ANSWER_BYTES:
            await context.write(response.SerializeToString())
            return
        booking: Booking = await self._answers.book(context.peer(), size_bytes)
        try:
            await context.write(await self._serialised(response, size_bytes))
        finally:
            booking.release()

    async def _serialised(self, response: Message, size_bytes: int) -> bytes:
        if size_bytes <= SMALL_ANSWER_BYTES:
            return response.SerializeToString()
        return await self._threads.run(response.SerializeToString)


def _releasing(booking: Booking) -> Any:  # noqa: ANN401 (the stubs have a class of their own for callbacks)
    return lambda _context: booking.release()


def _checked_size(response: Message) -> int:
    size_bytes = response.ByteSize()
    if size_bytes > LARGEST_ANSWER_BYTES:
        raise answer_too_large(size_bytes)
    return size_bytes


def _reading(respond: _Behaviour, read: Callable[[bytes], Any]) -> _Behaviour:
    async def read_and_respond(request: bytes, context: _Context) -> Any:  # noqa: ANN401 (any message)
        message = await read(request)
        del request  # a call may take minutes
        return await respond(message, context)

    return read_and_respond


def _reading_all(respond: _Behaviour, read: Callable[[bytes], Any]) -> _Behaviour:
    async def read_and_respond(requests: AsyncIterable[bytes], context: _Context) -> Any:  # noqa: ANN401 (any message)
        return await respond(_Read(requests, read), context)

    return read_and_respond


class _Read:
    """A caller's messages."""

    def __init__(self, requests: AsyncIterable[bytes], read: Callable[[bytes], Any]) -> None:
        self._requests = aiter(requests)
        self._read = read

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:  # noqa: ANN401 (any message)
        return await self._read(await anext(self._requests))


class _Writing:
    """A context whose `write` takes a message; all else is the context's own."""

    def __init__(self, context: _Context, write: Callable[[_Context, Message], Any]) -> None:
        self._context = context
        self._write = write

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 (whatever the context has)
        return getattr(self._context, name)

    async def write(self, message: Message) -> None:
        await self._write(self._context, message)
