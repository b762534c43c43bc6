"""How calls end when the server stops: live streams at once, the others when their time is up, all with UNAVAILABLE."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from ferryman_service.domain.errors import ServerShuttingDown


class Shutdown:
    """One per server; belongs to its event loop."""

    def __init__(self) -> None:
        self._waits = _Scopes()
        self._calls = _Scopes()
        self._begun = False
        self._callers_know = asyncio.Event()

    def begin(self) -> None:
        """End every wait, and every later one at once. New calls are held."""
        self._begun = True
        self._waits.end()

    def answer_held(self) -> None:
        """End the calls that are held, and every later one at once."""
        self._callers_know.set()

    async def let_in(self) -> None:
        """Return, or, once the shutdown has begun, hold the call until callers know, then raise ServerShuttingDown.

        gRPC cancels the calls that it has received and not handed over when it begins to stop, and callers cannot tell
        that from a cancellation of their own. A caller whose call is held sends no further one that this could hit.
        """
        if self._begun:
            await self._callers_know.wait()
            raise _stopping({})

    def give_up(self) -> None:
        """End every call that is still in flight, and every later one at once."""
        self._calls.end()

    @asynccontextmanager
    async def ends_wait(self, **hints: object) -> AsyncIterator[None]:
        """Run the block; cancel what it awaits and raise ServerShuttingDown as soon as the shutdown begins.

        Put only waiting into it: what the block awaits is given up half done. The hints tell the caller where to go on.
        """
        async with self._waits.one(hints):
            yield

    @asynccontextmanager
    async def ends_call(self) -> AsyncIterator[None]:
        """Run the block, a whole call; cancel it and raise ServerShuttingDown when its time to end is up."""
        async with self._calls.one({}):
            yield


class _Scopes:
    """Blocks that can be ended together."""

    def __init__(self) -> None:
        self._ended = False
        self._running: set[asyncio.Timeout] = set()

    def end(self) -> None:
        self._ended = True
        for scope in self._running:
            scope.reschedule(asyncio.get_running_loop().time())

    @asynccontextmanager
    async def one(self, hints: Mapping[str, object]) -> AsyncIterator[None]:
        scope = asyncio.timeout(0 if self._ended else None)
        try:
            async with scope:
                self._running.add(scope)
                yield
        except TimeoutError:
            if scope.expired():
                raise _stopping(hints) from None
            raise
        finally:
            self._running.discard(scope)


def _stopping(hints: Mapping[str, object]) -> ServerShuttingDown:
    return ServerShuttingDown("the server is stopping: call again, another one or the next goes on", **hints)
