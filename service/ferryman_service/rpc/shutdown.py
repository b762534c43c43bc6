"""Ends live streams when the server stops, so that they neither hold it up nor look finished."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from ferryman_service.domain.errors import ServerShuttingDown


class Shutdown:
    """One per server; belongs to its event loop."""

    def __init__(self) -> None:
        self._begun = False
        self._waiting: set[asyncio.Timeout] = set()

    def begin(self) -> None:
        """End every wait, and every later one at once."""
        self._begun = True
        for scope in self._waiting:
            scope.reschedule(asyncio.get_running_loop().time())

    @asynccontextmanager
    async def ends_wait(self) -> AsyncIterator[None]:
        """Run the block; cancel what it awaits and raise ServerShuttingDown as soon as the shutdown begins.

        Put only waiting into it: what the block awaits is given up half done.
        """
        scope = asyncio.timeout(0 if self._begun else None)
        try:
            async with scope:
                self._waiting.add(scope)
                yield
        except TimeoutError:
            if scope.expired():
                raise ServerShuttingDown(
                    "the server is stopping: call again, another one or the next goes on"
                ) from None
            raise
        finally:
            self._waiting.discard(scope)
