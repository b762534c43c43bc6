"""The sweeper."""

import asyncio

from ferryman_service.application.sweeper import Sweeper
from ferryman_service.domain.threads import Threads


async def test_a_store_that_cannot_be_swept_keeps_no_other_from_it():
    thread, swept = Threads(1, "sweeper"), asyncio.Event()
    loop, begun = asyncio.get_running_loop(), []

    def failing():
        begun.append(True)
        raise OSError("an error of the disk")

    sweeper = Sweeper((failing, lambda: loop.call_soon_threadsafe(swept.set)), thread, interval_s=0.001)
    running = asyncio.create_task(sweeper.run())
    async with asyncio.timeout(30):
        while len(begun) < 3:
            swept.clear()
            await swept.wait()
    running.cancel()
    await asyncio.to_thread(thread.close)
