"""Work that keeps every thread of the event loop's own."""

import asyncio
import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor


@contextlib.asynccontextmanager
async def busy_threads():
    """For the length of the block, asyncio.to_thread begins nothing."""
    released = threading.Event()
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(max_workers=1))
    busy = asyncio.create_task(asyncio.to_thread(released.wait, 60))
    try:
        await asyncio.sleep(0)  # so that it is the first
        yield
    finally:
        released.set()
        await busy
