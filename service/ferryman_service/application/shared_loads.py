"""Loads of models that many may wait for, each in one thread."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Callable
from concurrent.futures import Executor
from typing import TypeAlias

from ferryman_service.application.loaded_models import Lease, LoadedModels
from ferryman_service.domain.errors import ServerShuttingDown
from ferryman_service.domain.log_context import in_context
from ferryman_service.domain.models import ModelReference, ModelVersion

_Key: TypeAlias = tuple[ModelReference, str]
_Ended: TypeAlias = Callable[[BaseException | None], None]


class SharedLoads:
    """Loads under way, one for a version that a reference names however many wait for it; belongs to an event loop."""

    def __init__(self, loaded: LoadedModels, loading: Executor, freeing: Executor) -> None:
        """Store the threads that load, and those that free what nobody wants any more."""
        self._loaded = loaded
        self._loading = loading
        self._freeing = freeing
        self._waiting: dict[_Key, list[asyncio.Future[Lease]]] = {}

    def is_under_way(self, reference: ModelReference, version: ModelVersion) -> bool:
        """Tell whether the version is being loaded for those who ask by this reference."""
        return (reference, version.reference) in self._waiting

    async def lease(self, reference: ModelReference, version: ModelVersion) -> Lease:
        """Wait for the load, which goes on if nobody waits any more, and return a lease. Raises what
        LoadedModels.acquire does, and what `begin` does."""
        if not self.is_under_way(reference, version):
            self.begin(reference, version, lambda error: None)
        turn: asyncio.Future[Lease] = asyncio.get_running_loop().create_future()
        self._waiting[reference, version.reference].append(turn)
        try:
            return await turn
        except asyncio.CancelledError:
            if not turn.cancelled() and turn.exception() is None:
                turn.result().release(self._freeing)  # it came just when the caller gave up
            raise

    def begin(self, reference: ModelReference, version: ModelVersion, ended: _Ended) -> None:
        """Load a version that is not being loaded; `ended` is told whether that failed, in the event loop. Raises
        RuntimeError if there is no thread to be had for it."""
        key = reference, version.reference
        assert key not in self._waiting, "one load of a version is enough"
        given_up = threading.Event()

        def acquire() -> Lease:
            lease = self._loaded.acquire(reference, version)
            if given_up.is_set():  # an executor that starts no thread may leave its work to one that it has
                lease.release(self._freeing)
            return lease

        self._waiting[key] = []
        try:
            acquiring = asyncio.get_running_loop().run_in_executor(self._loading, in_context(acquire))
        except BaseException:
            given_up.set()
            del self._waiting[key]
            raise
        acquiring.add_done_callback(functools.partial(self._tell, key, ended))

    def _tell(self, key: _Key, ended: _Ended, acquiring: asyncio.Future[Lease]) -> None:
        waiting = [turn for turn in self._waiting.pop(key) if not turn.done()]
        if acquiring.cancelled():
            error: BaseException | None = ServerShuttingDown("the server is stopping: call again, another one goes on")
        else:
            error = acquiring.exception()
        if error is None:
            lease = acquiring.result()
            for turn in waiting:
                turn.set_result(lease.share())
            ended(None)
            lease.release(self._freeing)  # last: what served meanwhile must leave before what was loaded
        else:
            for turn in waiting:
                turn.set_exception(error)
            ended(error)
