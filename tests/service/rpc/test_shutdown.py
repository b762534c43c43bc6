"""What ends when, once the server stops."""

import asyncio

import pytest

from ferryman_service.domain.errors import ServerShuttingDown
from ferryman_service.rpc.shutdown import Shutdown


async def ended_by(scope):
    """Wait in the scope for ever; return the error that ends it."""
    with pytest.raises(ServerShuttingDown) as caught:
        async with scope:
            await asyncio.Event().wait()
    return caught.value


async def is_pending(task):
    await asyncio.sleep(0.02)
    return not task.done()


async def test_waits_end_at_the_beginning_with_their_hints_and_calls_when_they_are_given_up():
    shutdown = Shutdown()
    wait = asyncio.create_task(ended_by(shutdown.ends_wait(after_sequence=7)))
    call = asyncio.create_task(ended_by(shutdown.ends_call()))
    assert await is_pending(wait)
    shutdown.begin()
    assert (await wait).metadata == {"after_sequence": "7"}
    assert (await ended_by(shutdown.ends_wait())).reason == "SERVER_SHUTTING_DOWN"
    assert await is_pending(call)
    shutdown.give_up()
    assert (await call).metadata == {}
    assert (await ended_by(shutdown.ends_call())).reason == "SERVER_SHUTTING_DOWN"


async def test_new_calls_are_let_in_until_it_begins_then_held_then_refused():
    shutdown = Shutdown()
    await shutdown.let_in()
    shutdown.begin()
    held = asyncio.create_task(shutdown.let_in())
    assert await is_pending(held)
    shutdown.answer_held()
    for waiting in (held, shutdown.let_in()):
        with pytest.raises(ServerShuttingDown):
            await waiting


async def test_a_timeout_of_the_block_s_own_is_not_taken_for_the_end():
    with pytest.raises(TimeoutError):
        async with Shutdown().ends_call():
            raise TimeoutError


async def test_call_that_ends_by_itself_is_left_alone():
    shutdown = Shutdown()
    async with shutdown.ends_call(), shutdown.ends_wait():
        pass
    shutdown.begin()
    shutdown.give_up()
