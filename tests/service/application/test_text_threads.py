"""Threads for texts: who gives up is not worked for, and holds on to what a thread uses."""

import asyncio
import gc
import threading

import pytest

from ferryman_service.application.text_threads import TextThreads
from ferryman_service.domain.errors import DeadlineExceeded
from ferryman_service.domain.translation import CancelToken


@pytest.fixture
def threads():
    threads = TextThreads(1, "text")
    yield threads
    threads.close()


async def turns():
    """Let the event loop begin what is ready, and what follows from it."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_work_is_done_and_its_errors_are_raised(threads):
    assert await threads.run(CancelToken(), lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        await threads.run(CancelToken(), lambda: 1 // 0)


async def test_abandoned_work_is_not_begun(threads):
    gate, done = threading.Event(), []
    first = asyncio.create_task(threads.run(CancelToken(), lambda: gate.wait(10)))
    second = asyncio.create_task(threads.run(CancelToken(), lambda: done.append("of who gave up")))
    late = asyncio.create_task(threads.run(CancelToken(deadline_s=0.0), lambda: done.append("past its deadline")))
    await turns()
    second.cancel()
    await turns()
    gate.set()
    assert await first
    with pytest.raises(asyncio.CancelledError):
        await second
    with pytest.raises(DeadlineExceeded):
        await late
    assert done == []


async def test_error_of_cancelled_work_is_not_logged(threads):
    logged, gate = [], threading.Event()
    asyncio.get_running_loop().set_exception_handler(lambda _, context: logged.append(context))
    first = asyncio.create_task(threads.run(CancelToken(), lambda: gate.wait(10)))
    second = asyncio.create_task(threads.run(CancelToken(), lambda: 1))  # its thread raises Cancelled
    await turns()
    second.cancel()
    await turns()
    second.cancel()
    gate.set()
    await asyncio.wait((first, second))
    del second
    gc.collect()
    assert logged == []


async def test_cancelled_caller_waits_for_the_thread(threads):
    began, gate = threading.Event(), threading.Event()
    token = CancelToken()

    def work():
        began.set()
        assert gate.wait(10)

    working = asyncio.create_task(threads.run(token, work))
    assert await asyncio.to_thread(began.wait, 10)
    working.cancel()
    await turns()
    assert not working.done() and not token.is_wanted()
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await working
