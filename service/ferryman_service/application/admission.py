"""How much translating may wait and run at the same time in this process, counted in row tokens.

A sentence costs its source subwords times its rows (the beam, or the samples): what it takes of encoder, cache and
decoder grows with both, and a translation is about as long as its source. Nothing is counted while models load.

Unary calls and streams have a budget each, of the same size, so that neither can shut the other out: a call that finds
no room is refused at once, a stream waits for its turn, first come, first served. A cost above the whole budget is let
through when nothing else is there. All of it belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from ferryman_service.domain.errors import QueueFull
from ferryman_service.domain.translation import PreparedSentence, SearchOptions

_FORGET_S: Final = 10.0
_UNKNOWN_DELAY_S: Final = 1.0
_LEAST_DELAY_S: Final = 0.1
_MOST_DELAY_S: Final = 30.0


def cost_tokens(sentence: PreparedSentence, options: SearchOptions) -> int:
    """Return what a sentence costs, row tokens: its source's, or those that its translation must have, if that is more;
    at least 1, also for an empty sentence."""
    return max(1, max(len(sentence.source), sentence.min_length) * options.rows)


class TokenBudget:
    """Tokens that are lent and given back. `used` are lent now."""

    def __init__(self, limit_tokens: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Store; `clock` tells seconds."""
        assert limit_tokens > 0, "a budget must be positive"
        self.used = 0
        self._limit = limit_tokens
        self._drain = _DrainRate(clock)
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    def fits(self, tokens: int) -> bool:
        """Tell whether there is room, now."""
        return self.used == 0 or self.used + tokens <= self._limit

    def try_take(self, tokens: int) -> bool:
        """Take the tokens if there is room; they must be given back."""
        if not self.fits(tokens):
            return False
        self._lend(tokens)
        return True

    async def take(self, tokens: int) -> None:
        """Wait, behind those who wait already, until there is room, and take the tokens."""
        if not self._waiting and self.try_take(tokens):
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((tokens, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._serve()  # it may have stood before somebody for whom there is room
            else:
                self.give_back(tokens)
            raise

    def give_back(self, tokens: int) -> None:
        """Give tokens back; whoever waits first gets room first."""
        self.used -= tokens
        assert self.used >= 0, "more was given back than was taken"
        self._drain.drained(tokens)
        self._serve()

    def delay_s(self, tokens: int) -> float:
        """Estimate when there will be room, seconds from now, by how fast tokens have come back lately."""
        missing = self.used + min(tokens, self._limit) - self._limit
        rate = self._drain.tokens_per_second()
        delay_s = _UNKNOWN_DELAY_S if rate is None else missing / rate
        return min(max(delay_s, _LEAST_DELAY_S), _MOST_DELAY_S)

    def _lend(self, tokens: int) -> None:
        if self.used == 0:
            self._drain.begin()
        self.used += tokens

    def _serve(self) -> None:
        while self._waiting and (self._waiting[0][1].cancelled() or self.fits(self._waiting[0][0])):
            tokens, turn = self._waiting.popleft()
            if not turn.cancelled():
                self._lend(tokens)
                turn.set_result(None)


class Admission:
    """The budgets of unary calls and of streams."""

    def __init__(self, limit_tokens: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Make two budgets of `limit_tokens` row tokens each; `clock` tells seconds."""
        self.calls = TokenBudget(limit_tokens, clock)
        self.streams = TokenBudget(limit_tokens, clock)
        self._limit = limit_tokens

    def check(self, tokens: int) -> None:
        """Raise QueueFull if a call of at least so many tokens could not be admitted now; takes nothing."""
        if not self.calls.fits(tokens):
            raise self._full(tokens)

    def admit(self, tokens: int) -> None:
        """Take the tokens of a call; raises QueueFull. They go back to `calls`."""
        if not self.calls.try_take(tokens):
            raise self._full(tokens)

    def _full(self, tokens: int) -> QueueFull:
        delay_s = self.calls.delay_s(tokens)
        return QueueFull(
            f"the request takes {tokens:,} row tokens (source subwords times beam), and of the {self._limit:,} that "
            f"this server lets wait {self.calls.used:,} are taken: call again in {delay_s:.1f} s, or use "
            "StreamTranslate, which waits",
            retry_delay_s=delay_s,
            request_tokens=tokens,
            queued_tokens=self.calls.used,
            limit_tokens=self._limit,
        )


class _DrainRate:
    """Tokens that come back a second, over the time in which any were lent; what is ten seconds old counts a third."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._tokens = 0.0
        self._seconds = 0.0
        self._since_s = clock()

    def begin(self) -> None:
        self._since_s = self._clock()

    def drained(self, tokens: int) -> None:
        now_s = self._clock()
        passed_s = now_s - self._since_s
        kept = math.exp(-passed_s / _FORGET_S)
        self._tokens = self._tokens * kept + tokens
        self._seconds = self._seconds * kept + passed_s
        self._since_s = now_s

    def tokens_per_second(self) -> float | None:
        """None while nothing is known."""
        return self._tokens / self._seconds if self._seconds > 0 and self._tokens > 0 else None
