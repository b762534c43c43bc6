"""Threads that cut long texts into sentences and subwords."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from ferryman_service.domain.translation import CancelToken

T = TypeVar("T")


class TextThreads:
    """A few threads for one kind of caller, first come, first served."""

    def __init__(self, count: int, name: str) -> None:
        """Start none yet."""
        self._executor = ThreadPoolExecutor(max_workers=count, thread_name_prefix=name)

    async def run(self, token: CancelToken, work: Callable[[], T]) -> T:
        """Do the work in a thread, unless nobody waits any more when its turn comes: then raise Cancelled or
        DeadlineExceeded.

        A thread cannot be stopped. So whoever is cancelled gets no further than here until the thread has let go of the
        texts and of the model, and holds what was taken for them until then.
        """

        def wanted_work() -> T:
            token.check()
            return work()

        working = asyncio.get_running_loop().run_in_executor(self._executor, wanted_work)
        try:
            return await asyncio.shield(working)
        except asyncio.CancelledError:
            token.cancel()
            # Nobody will ask for the work's error, and asyncio would log it, with its traceback.
            working.add_done_callback(lambda done: done.cancelled() or done.exception())
            await asyncio.wait((working,))
            raise

    def close(self) -> None:
        """Wait for the work in hand."""
        self._executor.shutdown(wait=True)
