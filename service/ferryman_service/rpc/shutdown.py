"""Ends live streams when the server stops, so that they neither hold it up nor look finished."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, TypeVar

from ferryman_service.domain.errors import ServerShuttingDown

Item = TypeVar("Item")


class Shutdown:
    """One per server; belongs to its event loop."""

    def __init__(self) -> None:
        self._begun = asyncio.Event()

    def begin(self) -> None:
        """Cut all live streams short, and every later one at once."""
        self._begun.set()

    async def cut_short(self, items: AsyncIterator[Item]) -> AsyncIterator[Item]:
        """Yield the items; raises ServerShuttingDown as soon as the shutdown begins."""
        begun = asyncio.ensure_future(self._begun.wait())
        try:
            while True:
                item = asyncio.ensure_future(anext(items))
                try:
                    await asyncio.wait((item, begun), return_when=asyncio.FIRST_COMPLETED)
                    if not item.done():
                        raise ServerShuttingDown("the server is stopping; call again with the last sequence received")
                    yield item.result()
                except StopAsyncIteration:
                    return
                finally:
                    await _end(item)
        finally:
            await _end(begun)


async def _end(future: asyncio.Future[Any]) -> None:
    """Cancel what still runs, and wait until it has cleaned up after itself."""
    if not future.done():
        future.cancel()
        await asyncio.wait((future,))
