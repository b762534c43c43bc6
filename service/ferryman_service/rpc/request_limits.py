"""Bounds on what callers hold of the server at the same time, checked before a message is read.

gRPC hands a call over when its headers have arrived, and reads a message only when it is asked to. Until then it takes
no more of the message than a flow-control window; from then on it takes all of it, up to the largest size. So every
handler is one of a stream of requests, which reads the one message of a unary call itself: a refused call is never
read, and a caller that falls silent halfway is not waited for permanently.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import grpc

from ferryman_service.config import open_files
from ferryman_service.domain.errors import (
    InvalidRequest,
    MessageOverdue,
    MessageTooLarge,
    TooManyCalls,
    TooManyOpenFiles,
    Violation,
)
from ferryman_service.observability.rpc import RpcMetrics

_MIB: Final = 2**20
_UPLOAD: Final = "/ferryman.v1.CorpusService/UploadCorpus"
_TRANSFERS: Final = (_UPLOAD, "/ferryman.v1.ModelService/DownloadModel")
_HEALTH: Final = "/grpc.health.v1."
_FIRST_HEALTH_MESSAGE_S: Final = 5.0
_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
_Behaviour: TypeAlias = "Callable[[Any, _Context], Any]"


@dataclass(frozen=True, kw_only=True)
class RequestLimits:
    """What callers may hold at the same time, of all connections together, and how long the server waits for them.

    `calls` counts all calls but those of health, which have `health_calls` and `health_watches`; uploads and downloads
    (`transfers`) and the other streams (`streams`) also count by themselves. A message has at most `message_bytes`, in
    an upload `upload_message_bytes`. `message_memory_bytes` is the memory for messages that have not arrived
    completely, at their largest size: half of it for streams, which hold their part while they send, half for unary
    calls, which wait for a part up to `memory_wait_s`. The first message of a call must arrive within
    `first_message_s`, that of a health check within 5 s, each next one of an upload within `next_upload_message_s`.
    """

    calls: int = 512
    transfers: int = 64
    streams: int = 256
    health_calls: int = 64
    health_watches: int = 64
    connections: int = 1024
    message_bytes: int = 4 * _MIB
    upload_message_bytes: int = _MIB
    message_memory_bytes: int = 1024 * _MIB
    memory_wait_s: float = 5.0
    first_message_s: float = 60.0
    next_upload_message_s: float = 300.0

    @property
    def messages(self) -> int:
        """How many messages of the largest size may be incomplete, of streams and of unary calls each."""
        return max(1, self.message_memory_bytes // self.message_bytes // 2)

    @property
    def health_messages(self) -> int:
        """How many messages of health checks may be incomplete, beyond the others: an eighth of those of calls."""
        return min(self.health_calls, max(1, self.messages // 8))


DEFAULT_LIMITS: Final = RequestLimits()


class CallKind(enum.StrEnum):
    """What a call is counted as."""

    UNARY = "unary"
    STREAM = "stream"
    TRANSFER = "transfer"
    HEALTH = "health"
    WATCH = "watch"


def kind_of(method: str, *, streaming: bool) -> CallKind:
    """Return the kind of a call of the method, which is given as its path."""
    if method.startswith(_HEALTH):
        return CallKind.WATCH if streaming else CallKind.HEALTH
    if method in _TRANSFERS:
        return CallKind.TRANSFER
    return CallKind.STREAM if streaming else CallKind.UNARY


class CallGate:
    """Lets calls in and reads their messages; one per server, belongs to its event loop."""

    def __init__(
        self, limits: RequestLimits, metrics: RpcMetrics, files_run_short: Callable[[], bool] = open_files.half_used
    ) -> None:
        """Store; `files_run_short` tells whether transfers must not open any more."""
        self._limits = limits
        self._metrics = metrics
        self._files_run_short = files_run_short
        self._in_flight = dict.fromkeys(CallKind, 0)
        self._stream_messages = asyncio.Semaphore(limits.messages)
        self._unary_messages = asyncio.Semaphore(limits.messages)
        self._health_messages = asyncio.Semaphore(limits.health_messages)

    def guard(self, respond: _Behaviour, method: str, handler: _Handler) -> _Behaviour:
        """Return the behaviour, a coroutine function, as one that takes a stream of requests: it is called once the
        call is let in, with the one message of a unary call, or with the stream.

        Raises TooManyCalls, TooManyOpenFiles; MessageOverdue, InvalidRequest (there is no message).
        """
        kind = kind_of(method, streaming=handler.request_streaming or handler.response_streaming)
        read = self._one_message(kind) if not handler.request_streaming else self._messages(method)

        async def let_in_and_respond(requests: Any, context: _Context) -> Any:  # noqa: ANN401 (any message)
            with self._place(kind):
                async with read(requests, context) as request:
                    return await respond(request, context)

        return let_in_and_respond

    def reader(self, method: str) -> Callable[[bytes], bytes] | None:
        """Return what looks at each message of a stream of requests, which stays bytes; raises MessageTooLarge. None
        where gRPC's own limit is the method's."""
        limit_bytes = self._limits.upload_message_bytes
        if method != _UPLOAD:
            return None

        def bounded(message: bytes) -> bytes:
            if len(message) > limit_bytes:
                size = f"{len(message):,} bytes, may have {limit_bytes:,}"
                raise MessageTooLarge(f"a message of the upload has {size}: send smaller ones", limit_bytes=limit_bytes)
            return message

        return bounded

    @contextmanager
    def _place(self, kind: CallKind) -> Iterator[None]:
        self._check_room(kind)
        if kind is CallKind.TRANSFER and self._files_run_short():
            self._metrics.refused("open_files")
            raise TooManyOpenFiles("the server has few files left to open, so it takes no transfer now: try again")
        self._count(kind, 1)
        try:
            yield
        finally:
            self._count(kind, -1)

    def _check_room(self, kind: CallKind) -> None:
        counted = [(kind, self._in_flight[kind], self._own_limit(kind))]
        if kind not in _OF_HEALTH:
            all_calls = sum(count for each, count in self._in_flight.items() if each not in _OF_HEALTH)
            counted.append((CallKind.UNARY, all_calls, self._limits.calls))
        for limited, found, limit in counted:
            if found >= limit:
                name = _LIMIT_NAMES[limited]
                self._metrics.refused(name)
                text = f"{limit} {_LIMIT_TEXTS[limited]} are in flight, as many as this server takes: try again"
                raise TooManyCalls(text, limit=name)

    def _own_limit(self, kind: CallKind) -> int:
        return {
            CallKind.UNARY: self._limits.calls,
            CallKind.STREAM: self._limits.streams,
            CallKind.TRANSFER: self._limits.transfers,
            CallKind.HEALTH: self._limits.health_calls,
            CallKind.WATCH: self._limits.health_watches,
        }[kind]

    def _count(self, kind: CallKind, change: int) -> None:
        self._in_flight[kind] += change
        self._metrics.in_flight(kind.value, change)

    def _one_message(self, kind: CallKind) -> Callable[[Any, _Context], Any]:
        memory, first_s = self._unary_messages, self._limits.first_message_s
        if kind in _OF_HEALTH:
            memory, first_s = self._health_messages, min(first_s, _FIRST_HEALTH_MESSAGE_S)

        @asynccontextmanager
        async def read(_: Any, context: _Context) -> AsyncIterator[bytes]:  # noqa: ANN401 (the stream)
            with await self._memory(memory):
                message = await self._in_time(context.read(), first_s)
            if message is grpc.aio.EOF:
                # So it also looks when the caller is gone; but then this raises, or the call's task is cancelled.
                await context.send_initial_metadata(())
                text = "is missing: the call ended without a message"
                raise InvalidRequest([Violation(field="request", description=text, reason="REQUIRED")])
            yield message

        return read

    def _messages(self, method: str) -> Callable[[Any, _Context], Any]:
        next_s = self._limits.next_upload_message_s if method == _UPLOAD else None

        @asynccontextmanager
        async def read(requests: Any, _: _Context) -> AsyncIterator[AsyncIterator[Any]]:  # noqa: ANN401 (the stream)
            with await self._memory(self._stream_messages) as memory:
                yield _TimedMessages(aiter(requests), self._in_time, self._limits.first_message_s, next_s, memory)

        return read

    async def _memory(self, parts: asyncio.Semaphore) -> ExitStack:
        """Wait for memory for one message, and return what gives it back when it is closed."""
        if parts.locked():
            try:
                # wait_for swallows a cancellation, in Python 3.11, that comes at the same moment as the memory.
                async with asyncio.timeout(self._limits.memory_wait_s):
                    await parts.acquire()
            except TimeoutError:
                self._metrics.refused("message_memory")
                text = "the server has no memory left for messages that are not complete: try again"
                raise TooManyCalls(text, limit="message_memory") from None
        else:
            await parts.acquire()
        self._metrics.incomplete_messages(1)
        held = ExitStack()
        held.callback(parts.release)
        held.callback(self._metrics.incomplete_messages, -1)
        return held

    async def _in_time(self, message: Awaitable[Any], limit_s: float | None) -> Any:  # noqa: ANN401 (any message)
        try:
            async with asyncio.timeout(limit_s) as limit:
                return await message
        except TimeoutError:
            if not limit.expired():
                raise
            self._metrics.refused("silence")
            text = f"the next message has not arrived completely within {limit_s:g} s: send it sooner, or end the call"
            raise MessageOverdue(text, limit_s=f"{limit_s:g}") from None


class _TimedMessages:
    """A caller's messages: the first within `first_s`, each next one within `next_s`, None for no limit. At their end
    the memory is given back."""

    def __init__(
        self,
        messages: AsyncIterator[Any],
        in_time: Callable[[Awaitable[Any], float | None], Awaitable[Any]],
        first_s: float,
        next_s: float | None,
        memory: ExitStack,
    ) -> None:
        self._messages = messages
        self._in_time = in_time
        self._limit_s: float | None = first_s
        self._next_s = next_s
        self._memory = memory

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:  # noqa: ANN401 (any message)
        try:
            message = await self._in_time(anext(self._messages), self._limit_s)
        except StopAsyncIteration:
            self._memory.close()
            raise
        self._limit_s = self._next_s
        return message


_OF_HEALTH: Final = (CallKind.HEALTH, CallKind.WATCH)
_LIMIT_NAMES: Final = {
    CallKind.UNARY: "calls",
    CallKind.STREAM: "streams",
    CallKind.TRANSFER: "transfers",
    CallKind.HEALTH: "health_calls",
    CallKind.WATCH: "health_watches",
}
_LIMIT_TEXTS: Final = {
    CallKind.UNARY: "calls",
    CallKind.STREAM: "streams",
    CallKind.TRANSFER: "uploads and downloads",
    CallKind.HEALTH: "health checks",
    CallKind.WATCH: "watches of health",
}
