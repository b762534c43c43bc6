"""How many bytes of large answers may be in memory because their callers have not read them yet.

An answer is booked before it is built, as large as it may become, and given back once the transport has taken all of
it: HTTP/2 takes no more than the caller's windows let through. So callers who do not read hold up others who ask for
large answers, and first of all themselves: a connection has a quarter of the budget.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from typing import Final

from ferryman_service.domain.errors import AnswersUnread, AnswerTooLarge

LARGEST_ANSWER_BYTES: Final = 16 * 2**20
SMALL_ANSWER_BYTES: Final = 64 * 2**10
"""Answers up to this size are not booked: the number of calls bounds them."""
_CONNECTIONS: Final = 4
_WAIT_S: Final = 10.0


class AnswerBudget:
    """Belongs to one event loop. Who waits first is served first, but for connections that have used up their share."""

    def __init__(
        self, limit_bytes: int = 256 * 2**20, connection_bytes: int | None = None, wait_s: float = _WAIT_S
    ) -> None:
        """Store; `connection_bytes` None: a quarter of the limit. A call waits for `wait_s`, then it is refused."""
        self.used_bytes = 0
        self._limit_bytes = limit_bytes
        self._connection_bytes = limit_bytes // _CONNECTIONS if connection_bytes is None else connection_bytes
        self._wait_s = wait_s
        self._used_by: Counter[str] = Counter()
        self._waiting: deque[_Waiting] = deque()

    async def book(self, peer: str, size_bytes: int) -> Booking:
        """Wait until there is room for an answer to this connection; raises AnswersUnread."""
        waiting = _Waiting(peer, size_bytes)
        self._waiting.append(waiting)
        self._serve()
        try:
            async with asyncio.timeout(self._wait_s):
                await waiting.turn
        except TimeoutError:
            self._forget(waiting)
            raise self._unread(peer) from None
        except BaseException:
            self._forget(waiting)
            raise
        return Booking(self, peer, size_bytes)

    def change(self, peer: str, change_bytes: int) -> None:
        """Book that much more, or give it back."""
        self.used_bytes += change_bytes
        self._used_by[peer] += change_bytes
        assert self.used_bytes >= 0 <= self._used_by[peer], "more is given back than was booked"
        if not self._used_by[peer]:
            del self._used_by[peer]
        if change_bytes < 0:
            self._serve()

    def _serve(self) -> None:
        for waiting in list(self._waiting):
            mine = self._used_by[waiting.peer]
            if mine and mine + waiting.size_bytes > self._connection_bytes:
                continue
            if self.used_bytes and self.used_bytes + waiting.size_bytes > self._limit_bytes:
                return
            self._waiting.remove(waiting)
            if not waiting.turn.done():
                self.change(waiting.peer, waiting.size_bytes)
                waiting.turn.set_result(None)

    def _forget(self, waiting: _Waiting) -> None:
        """Let somebody wait no longer, who may have got what he waited for a moment ago."""
        if waiting in self._waiting:
            self._waiting.remove(waiting)
            self._serve()
        elif waiting.turn.done() and not waiting.turn.cancelled():
            self.change(waiting.peer, -waiting.size_bytes)

    def _unread(self, peer: str) -> AnswersUnread:
        mine = self._used_by[peer]
        whose = f"{mine:,} bytes of answers on this connection" if mine else f"{self.used_bytes:,} bytes of answers"
        return AnswersUnread(
            f"{whose} have not been read by their callers: read them, or ask for less at a time, then call again",
            unread_bytes=mine or self.used_bytes,
            limit_bytes=self._connection_bytes if mine else self._limit_bytes,
        )


class _Waiting:
    def __init__(self, peer: str, size_bytes: int) -> None:
        self.peer = peer
        self.size_bytes = size_bytes
        self.turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class Booking:
    """Bytes that are booked for an answer."""

    def __init__(self, budget: AnswerBudget, peer: str, size_bytes: int) -> None:
        self._budget = budget
        self._peer = peer
        self._size_bytes = size_bytes

    def settle(self, size_bytes: int) -> None:
        """Book what the answer does take; harmless after `release`."""
        if self._size_bytes:
            change, self._size_bytes = size_bytes - self._size_bytes, size_bytes
            self._budget.change(self._peer, change)

    def release(self) -> None:
        """Give all back; harmless when repeated."""
        size_bytes, self._size_bytes = self._size_bytes, 0
        if size_bytes:
            self._budget.change(self._peer, -size_bytes)


def answer_too_large(size_bytes: int) -> AnswerTooLarge:
    """Return the error of an answer that has at least so many bytes."""
    return AnswerTooLarge(
        f"the answer has {size_bytes:,} bytes or more, may have {LARGEST_ANSWER_BYTES:,}: ask for less in a call",
        answer_bytes=size_bytes,
        limit_bytes=LARGEST_ANSWER_BYTES,
    )
