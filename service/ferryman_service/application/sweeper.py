"""Removes, every hour, what uploads, imports, exports and deletions that ended have left in the data folder."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Final

from ferryman_service.domain.threads import Threads

_log = logging.getLogger(__name__)
_INTERVAL_S: Final = 3600.0


class Sweeper:
    """Sweeps the stores one after the other. The first sweep is an hour after the start, which has swept already."""

    def __init__(self, sweeps: Sequence[Callable[[], None]], thread: Threads, interval_s: float = _INTERVAL_S) -> None:
        """Store the stores' sweeps and the thread for them."""
        self._sweeps = sweeps
        self._thread = thread
        self._interval_s = interval_s

    async def run(self) -> None:
        """Sweep until cancelled."""
        while True:
            await asyncio.sleep(self._interval_s)
            await self._thread.run(self.sweep)

    def sweep(self) -> None:
        """Sweep once. One store that cannot be swept now keeps no other from it; the next sweep tries again."""
        for sweep in self._sweeps:
            try:
                sweep()
            except Exception:  # noqa: BLE001 (whatever it is, it must not end the other sweeps)
                _log.exception("leftovers could not be removed, trying again in %g s", self._interval_s)
