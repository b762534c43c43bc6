"""From a model's reference to a lease of the loaded model, on the shortest way.

To resolve a reference takes a transaction in a thread. So what was resolved is remembered as long as nothing in the
database has changed: a new version, a moved alias or a deletion counts from the very next request on. If the version is
in memory too, nobody waits, and no thread is needed. Loads have threads of their own: however many wait for one, a
model that is in memory is resolved and leased meanwhile.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import Executor

from ferryman_service.application.loaded_models import Lease, LoadedModels
from ferryman_service.application.ports import ModelStore
from ferryman_service.domain.models import ModelReference, ModelVersion


class ModelAccess:
    """Leases models; belongs to an event loop."""

    def __init__(self, models: ModelStore, loaded: LoadedModels, executor: Executor, loading: Executor) -> None:
        """Store; threads of `executor` wait for the database, those of `loading` for loads."""
        self._models = models
        self._loaded = loaded
        self._executor = executor
        self._loading = loading
        self._revision: int | None = None
        self._versions: dict[ModelReference, ModelVersion] = {}

    async def lease(self, reference: ModelReference) -> Lease:
        """Return a lease of the version that the reference names now. Raises what LoadedModels.acquire does."""
        revision = self._models.revision()
        if revision != self._revision:
            self._versions.clear()
            self._revision = revision
        version = self._versions.get(reference)
        if version is None:
            loop = asyncio.get_running_loop()
            version = await loop.run_in_executor(self._executor, self._models.resolve, reference)
        lease = self._loaded.try_acquire(version) or await self._acquire(reference, version)
        if revision == self._revision:
            self._versions[reference] = lease.version
        return lease

    async def _acquire(self, reference: ModelReference, version: ModelVersion) -> Lease:
        """Wait for a lease in a thread; one that comes after its caller has given up is given back."""
        loop = asyncio.get_running_loop()
        acquiring = loop.run_in_executor(self._loading, self._loaded.acquire, reference, version)
        try:
            lease = await asyncio.shield(acquiring)
        except asyncio.CancelledError:
            acquiring.add_done_callback(self._discard)
            raise
        return lease

    def _discard(self, acquiring: asyncio.Future[Lease]) -> None:
        if not acquiring.cancelled() and acquiring.exception() is None:
            acquiring.result().release(self._executor)
