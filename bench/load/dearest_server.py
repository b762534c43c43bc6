"""The service, with a watch on its event loop: `python -m bench.load.dearest_server FILE serve ...`.

The file's first eight bytes hold the most processor time, in seconds, that the event loop's thread took between two
ticks of a millisecond since 0.0 was last written there.
"""

from __future__ import annotations

import asyncio
import mmap
import struct
import sys
import time
from pathlib import Path
from typing import Final

from ferryman_service.__main__ import main

TICK_S: Final = 0.001
SECONDS: Final = struct.Struct("<d")


class _WatchedLoops(asyncio.DefaultEventLoopPolicy):
    """Makes event loops that note how long their thread computes between two ticks."""

    def __init__(self, seen: mmap.mmap) -> None:
        super().__init__()
        self._seen = seen

    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        loop = super().new_event_loop()
        loop.call_soon(self._begin, loop)
        return loop

    def _begin(self, loop: asyncio.AbstractEventLoop) -> None:
        self._tick(loop, time.thread_time())

    def _tick(self, loop: asyncio.AbstractEventLoop, before_s: float) -> None:
        now_s = time.thread_time()
        (most_s,) = SECONDS.unpack_from(self._seen)
        if now_s - before_s > most_s:
            SECONDS.pack_into(self._seen, 0, now_s - before_s)
        loop.call_later(TICK_S, self._tick, loop, now_s)


def run(path: Path, arguments: list[str]) -> int:
    """Run the service's command, watched; return its exit status."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), SECONDS.size) as seen:
        asyncio.set_event_loop_policy(_WatchedLoops(seen))
        return main(arguments)


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1]), sys.argv[2:]))
