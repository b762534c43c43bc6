"""Threads for one kind of work, so that no other kind can keep it waiting."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
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


class ThreadsBySize:
    """Threads whose work has a size: small work goes first, and one thread is kept for work below `small`.

    Work is ordered by its size plus the size of all that was begun before it came. So large work waits for as much
    small work as it is large itself, and no longer. Must not be used after `close`.
    """

    def __init__(self, count: int, name: str, small: int) -> None:
        """Start none yet; `small` is in the unit of the sizes."""
        assert count >= 2, "one thread is kept for small work, and large work needs one"
        self._executor = ThreadPoolExecutor(max_workers=count, thread_name_prefix=name)
        self._small = small
        self._large_may_run = count - 1
        self._lock = threading.Lock()
        self._begun = 0
        self._numbers = itertools.count()
        self._waiting: dict[bool, list[tuple[int, int, int, Callable[[], None]]]] = {False: [], True: []}
        """By whether it is large: heaps of (order, number, size, work)."""

    async def run(self, size: int, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Do the work in a thread, with the log fields of the caller. Work that has begun goes on to its end, also if
        the caller is cancelled."""
        future: Future[T] = Future()
        bound = in_context(lambda: work(*args, **kwargs))
        with self._lock:
            item = (self._begun + size, next(self._numbers), size, lambda: _fulfil(future, bound))
            heapq.heappush(self._waiting[size >= self._small], item)
        self._executor.submit(self._work_off)
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Wait until all work has been done; there must be no more afterwards."""
        self._executor.shutdown(wait=True)

    def _work_off(self) -> None:
        """Do what waits, until nothing is left that this thread may do."""
        while (taken := self._take()) is not None:
            is_large, work = taken
            try:
                work()
            finally:
                with self._lock:
                    self._large_may_run += is_large

    def _take(self) -> tuple[bool, Callable[[], None]] | None:
        with self._lock:
            allowed = [is_large for is_large in (False, True) if not is_large or self._large_may_run]
            heaps = {is_large: self._waiting[is_large] for is_large in allowed if self._waiting[is_large]}
            if not heaps:
                return None
            is_large = min(heaps, key=lambda key: heaps[key][0])
            _, _, size, work = heapq.heappop(heaps[is_large])
            self._begun += size
            self._large_may_run -= is_large
            return is_large, work


def _fulfil(future: Future[T], work: Callable[[], T]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(work())
    except BaseException as error:  # noqa: BLE001 (it is the caller's)
        future.set_exception(error)
