"""Threads for one kind of work."""

import asyncio
import threading

import pytest

from ferryman_service.domain.log_context import log_fields, logging_with
from ferryman_service.domain.threads import Threads


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
