"""Threads for one kind of work, so that no other kind can keep it waiting."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from ferryman_service.domain.log_context import in_context

P = ParamSpec("P")
T = TypeVar("T")


class Threads:
    """A few threads; work begins in the order in which it came."""

    def __init__(self, count: int, name: str) -> None:
        """Start none yet."""
        self._executor = ThreadPoolExecutor(max_workers=count, thread_name_prefix=name)

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Do the work in a thread, with the log fields of the caller. Work that has begun goes on to its end, also if
        the caller is cancelled."""
        bound = in_context(lambda: work(*args, **kwargs))
        return await asyncio.get_running_loop().run_in_executor(self._executor, bound)

    def close(self) -> None:
        """Wait until all work has been done; there must be no more afterwards."""
        self._executor.shutdown(wait=True)
