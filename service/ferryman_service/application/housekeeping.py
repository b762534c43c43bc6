"""What is done now and then as long as the service runs, at the side of everything else."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ferryman_service.domain.errors import FerrymanError
from ferryman_service.domain.threads import Threads

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Duty:
    """Something to do every `interval_s`, for the first time `first_s` after the start. It may block, and may fail."""

    name: str
    work: Callable[[], None]
    interval_s: float
    first_s: float


class Housekeeping:
    """Does its duties one after the other, in a thread for nothing else."""

    def __init__(
        self,
        duties: Sequence[Duty],
        thread: Threads,
        clock: Callable[[], float] = time.monotonic,
        interval_s: float = 10.0,
    ) -> None:
        """Store; `clock` gives seconds, and is looked at every `interval_s`."""
        self._duties = duties
        self._thread = thread
        self._clock = clock
        self._interval_s = interval_s
        self._due_s = {duty.name: clock() + duty.first_s for duty in duties}

    async def run(self) -> None:
        """Work until cancelled; a duty that has begun goes on in its thread."""
        while True:
            await self.do_what_is_due()
            await asyncio.sleep(self._interval_s)

    async def do_what_is_due(self) -> None:
        """Do each duty whose time has come. What fails is logged and done again in its turn."""
        for duty in self._duties:
            if self._clock() < self._due_s[duty.name]:
                continue
            self._due_s[duty.name] = self._clock() + duty.interval_s
            try:
                await self._thread.run(duty.work)
            except (FerrymanError, OSError) as error:
                _log.warning("cannot %s, trying again later: %s", duty.name, error)
            except Exception:  # noqa: BLE001
                _log.exception("a bug in an attempt to %s", duty.name)
