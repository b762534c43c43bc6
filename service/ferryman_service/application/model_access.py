"""From a model's reference to a lease of the loaded model, on the shortest way.

To resolve a reference takes a transaction in a thread. So what was resolved is remembered as long as nothing in the
database has changed: a new version, a moved alias or a deletion counts from the very next request on. If the version is
in memory too, nobody waits, and no thread is needed. Loads have threads of their own, one for each version that is
being loaded however many wait for it: so a model that is in memory is resolved and leased meanwhile, and the load of
one does not hold up those of others.

A name without version or alias means the latest version. When a newer one is published, the one that the name was
served with before serves on while the newer one is loaded and warmed up, and keeps its memory as long: so no request
waits for the load. Should the load fail, it serves on too, and the load is tried again from time to time. It does not
serve on once it is deleted, or was unloaded; and nobody who asks by name gets an older version after a newer one.

While the database cannot be read, a reference means what it meant last, as long as that is in memory.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Final

from ferryman_service.application.loaded_models import Lease, LoadedModels
from ferryman_service.application.ports import ModelStore
from ferryman_service.application.shared_loads import SharedLoads
from ferryman_service.domain.errors import DatabaseDamaged, ModelNotFound, StoreUnavailable
from ferryman_service.domain.models import ModelReference, ModelVersion
from ferryman_service.domain.tracing import NULL_TRACER, Tracer

_log = logging.getLogger(__name__)
TRY_AGAIN_S: Final = 30.0
"""From the end of a load that has failed to the next, while an older version serves on."""


class ModelAccess:
    """Leases models; belongs to an event loop."""

    def __init__(
        self,
        models: ModelStore,
        loaded: LoadedModels,
        executor: Executor,
        loading: Executor,
        tracer: Tracer = NULL_TRACER,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Store; threads of `executor` wait for the database, those of `loading` for loads. `clock` tells seconds."""
        self._models = models
        self._loaded = loaded
        self._loads = SharedLoads(loaded, loading, executor)
        self._executor = executor
        self._tracer = tracer
        self._clock = clock
        self._revision: int | None = None
        self._versions: dict[ModelReference, ModelVersion] = {}
        self._known: dict[ModelReference, ModelVersion] = {}
        self._served: dict[str, ModelVersion] = {}  # the newest that each name alone was served with
        self._not_before_s: dict[str, float] = {}  # when a version whose load has failed may be tried again

    async def lease(self, reference: ModelReference) -> Lease:
        """Return a lease of the version that the reference names now, or of the one that serves on until that one is in
        memory. Raises what LoadedModels.acquire does."""
        revision = self._models.revision()
        if revision != self._revision:
            self._forget()
            self._revision = revision
        version = self._versions.get(reference)
        if version is None:
            try:
                version = await self._resolve(reference)
            except (StoreUnavailable, DatabaseDamaged):
                version = self._known_in_memory(reference)
                if version is None:
                    raise
            except ModelNotFound:
                self._known.pop(reference, None)
                raise
            else:
                if revision == self._revision:
                    self._versions[reference] = self._known[reference] = version
        lease = self._loaded.try_acquire(version)
        if lease is None:
            if predecessor := self._predecessor(reference, version):
                return predecessor
            with self._tracer.span("load", {"ferryman.model": version.reference}):
                lease = await self._loads.lease(reference, version)
        if _is_name_alone(reference) and revision == self._revision:
            self._served[reference.name] = lease.version
        return lease

    def known(self, reference: ModelReference) -> ModelVersion | None:
        """Return the version that the reference names now, if that is known without asking the database."""
        return self._versions.get(reference) if self._models.revision() == self._revision else None

    async def lease_in_memory(self, reference: ModelReference) -> Lease | None:
        """Return a lease of the version that the reference names now, None if that is not in memory: nothing is loaded.

        Raises ModelNotFound, StoreUnavailable.
        """
        return self._loaded.try_acquire(await self._resolve(reference))

    def _forget(self) -> None:
        """Forget what is not sure any more, and what serves nobody: names and versions come and go for years."""
        self._versions.clear()
        self._known = {name: version for name, version in self._known.items() if self._loaded.is_loaded(version)}
        now_s = self._clock()
        self._not_before_s = {name: at_s for name, at_s in self._not_before_s.items() if at_s > now_s}

    def _known_in_memory(self, reference: ModelReference) -> ModelVersion | None:
        """Return what the reference named when the database could last be read, if that is in memory."""
        version = self._known.get(reference)
        return version if version is not None and self._loaded.is_loaded(version) else None

    async def _resolve(self, reference: ModelReference) -> ModelVersion:
        """Return what the reference names; forget who served it before if that is deleted."""
        before = self._served.get(reference.name) if _is_name_alone(reference) else None
        loop = asyncio.get_running_loop()
        version, is_gone = await loop.run_in_executor(self._executor, self._look_up, reference, before)
        if is_gone and self._served.get(reference.name) is before:
            del self._served[reference.name]
        return version

    def _look_up(self, reference: ModelReference, before: ModelVersion | None) -> tuple[ModelVersion, bool]:
        version = self._models.resolve(reference)
        if before is None or before.version == version.version:
            return version, False
        try:
            self._models.resolve(ModelReference(name=before.name, version=before.version))
        except ModelNotFound:
            return version, True
        return version, False

    def _predecessor(self, reference: ModelReference, version: ModelVersion) -> Lease | None:
        """Return a lease of the older version that serves on, if there is one; the newer one is being loaded then."""
        before = self._served.get(reference.name) if _is_name_alone(reference) else None
        if before is None or before.version >= version.version:
            return None
        lease = self._loaded.try_acquire(before)
        if lease is not None and not self._loads.is_under_way(reference, version):
            self._take_over(reference, version, lease)
        return lease

    def _take_over(self, reference: ModelReference, version: ModelVersion, serving: Lease) -> None:
        """Begin to load the version, unless that has failed just now; what serves meanwhile keeps its memory."""
        if self._clock() < self._not_before_s.get(version.reference, 0.0):
            return
        kept = serving.share()

        def ended(error: BaseException | None) -> None:
            kept.release(self._executor)
            self._not_before_s.pop(version.reference, None)
            if error is not None:
                self._not_before_s[version.reference] = self._clock() + TRY_AGAIN_S
                _log.error("%s serves on: %s cannot be loaded: %r", kept.version.reference, version.reference, error)

        try:
            self._loads.begin(reference, version, ended)
        except RuntimeError as error:
            ended(error)


def _is_name_alone(reference: ModelReference) -> bool:
    return reference.version is None and reference.alias is None
