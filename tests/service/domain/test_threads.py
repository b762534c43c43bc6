"""Threads for one kind of work."""

import asyncio
import threading

import pytest

from ferryman_service.domain.log_context import log_fields, logging_with
from ferryman_service.domain.threads import Threads, ThreadsBySize


@pytest.fixture
def threads():
    threads = Threads(1, "work")
    yield threads
    threads.close()


async def test_work_runs_in_a_thread_of_its_own_kind_with_the_callers_log_fields(threads):
    def work(number, *, more):
        return number + more, threading.current_thread().name, log_fields()

    with logging_with(run_id="run-1"):
        assert await threads.run(work, 1, more=2) == (3, "work_0", {"run_id": "run-1"})


async def test_an_error_is_the_callers(threads):
    with pytest.raises(ZeroDivisionError):
        await threads.run(lambda: 1 / 0)


async def test_close_waits_for_work_whose_caller_has_left(threads):
    begun, released, ended = threading.Event(), threading.Event(), threading.Event()

    def work():
        begun.set()
        released.wait(60)
        ended.set()

    caller = asyncio.create_task(threads.run(work))
    assert await asyncio.to_thread(begun.wait, 30)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    closing = asyncio.create_task(asyncio.to_thread(threads.close))
    done, _ = await asyncio.wait((closing,), timeout=0.1)
    assert not done
    released.set()
    await closing
    assert ended.is_set()


@pytest.fixture
def by_size():
    threads = ThreadsBySize(2, "check", small=10)
    yield threads
    threads.close()


class Works:
    """Work that notes when it begins, and ends when the test says so."""

    def __init__(self, threads):
        self.begun = []
        self._threads = threads
        self._ends = {}

    def add(self, name, size):
        self._ends[name] = threading.Event()
        return asyncio.ensure_future(self._threads.run(size, self._work, name))

    def _work(self, name):
        self.begun.append(name)
        assert self._ends[name].wait(60)

    async def until_begun(self, *names):
        async with asyncio.timeout(30):
            while set(names) - set(self.begun):
                await asyncio.sleep(0.001)

    def end(self, *names):
        for name in names:
            self._ends[name].set()


async def test_small_work_waits_for_no_large_work(by_size):
    works = Works(by_size)
    tasks = [works.add("large", 100), works.add("larger", 1000)]
    await works.until_begun("large")
    for number in range(3):
        task = works.add(f"small {number}", 9)
        await works.until_begun(f"small {number}")
        works.end(f"small {number}")
        await task
    assert "larger" not in works.begun, "it would have taken the thread that is kept for small work"
    works.end("large", "larger")
    await asyncio.gather(*tasks)


async def test_the_smallest_work_goes_first_and_large_work_does_not_starve(by_size):
    works = Works(by_size)
    tasks = [works.add("a", 1), works.add("b", 1)]
    await works.until_begun("a", "b")
    tasks += [works.add("8", 8), works.add("50", 50), works.add("2", 2), works.add("5", 5)]
    works.end("b", "8", "50", "2", "5")
    await works.until_begun("50")
    assert works.begun[2:] == ["2", "5", "8", "50"]
    tasks += [works.add("c", 1)]
    await works.until_begun("c")
    tasks += [works.add("large", 30), *(works.add(f"small {number}", 9) for number in range(4))]
    works.end("c", "small 0", "small 1", "small 2")
    await works.until_begun("small 3")
    # As much small work as the large one is large has begun since it came: the next one has to wait for it.
    tasks += [works.add("late", 9)]
    works.end("small 3", "large", "late")
    await asyncio.gather(*tasks[1:])
    assert works.begun[-2:] == ["large", "late"]
    works.end("a")
    await tasks[0]


async def test_an_error_of_sized_work_is_the_callers(by_size):
    with pytest.raises(ZeroDivisionError):
        await by_size.run(1, lambda: 1 / 0)
    assert await by_size.run(1, lambda: 2) == 2
