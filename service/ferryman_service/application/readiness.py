"""What a process can do now, by what it finds in its data folder and in memory.

* Training and uploads need a database that can be written and is not known to be damaged, models one that can be read.
  Training needs a supervisor that works, too.
* Uploads need room on the disk, too. Below the low-water mark training is still ready: its runs go on, and its calls
  are those that free room.
* Translating needs a database that can be read, or a model in memory: that one translates on. That no model has been
  published yet is no reason to be unready, or a new installation would never become ready; a call that names a model
  which is not there learns so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass

from ferryman_service.application.loaded_models import LoadedModels
from ferryman_service.application.ports import StoreProbe
from ferryman_service.domain.readiness import StoreState
from ferryman_service.domain.threads import Threads


@dataclass(frozen=True, kw_only=True)
class Abilities:
    """What a process that has every role could do."""

    trains: bool = True
    writes: bool = True
    reads: bool = True
    translates: bool = True

    def covers(self, other: Abilities) -> bool:
        """Tell whether nothing is missing that the other has."""
        return all(mine or not its for mine, its in zip(astuple(self), astuple(other), strict=True))


class Readiness:
    """Tells what the process can do."""

    def __init__(
        self,
        probe: StoreProbe,
        loaded: LoadedModels | None,
        thread: Threads,
        supervises: Callable[[], bool] = lambda: True,
        has_space: Callable[[], bool] = lambda: True,
    ) -> None:
        """Store the ports; without loaded models this process does not translate. A look must begin at once: `thread`
        is for nothing else. `supervises` tells whether queued runs would start, `has_space` whether the disk has room
        for uploads."""
        self._has_space = has_space
        self._probe = probe
        self._loaded = loaded
        self._thread = thread
        self._supervises = supervises

    async def look(self) -> Abilities:
        """Look once, in a thread; takes as long as a transaction may wait."""
        store, has_space = await self._thread.run(lambda: (self._probe.look(), self._has_space()))
        return self.judge(store, has_space=has_space)

    def judge(self, store: StoreState, *, has_space: bool = True) -> Abilities:
        """Return what can be done with such a store, and with what is in memory."""
        writes, reads = store >= StoreState.USABLE, store >= StoreState.DAMAGED
        has_model = self._loaded is not None and bool(self._loaded.loaded())
        trains = writes and self._supervises()
        return Abilities(trains=trains, writes=writes and has_space, reads=reads, translates=reads or has_model)
