"""The models in memory: loaded when they are first asked for, shared, and freed when nobody uses them any more.

How versions take over from one another, so that no request fails or is disturbed:

* Loading holds up those who ask for the version that is being loaded, and nobody else.
* Who asks for a model by its name alone is served by the version before until the newest is loaded and warmed up
  (`application/model_access.py`).
* Before SetModelAlias moves an alias whose present target is in memory, it loads and warms up the new target: the
  requests that name the alias never wait for a load (`application/models.py`).
* What a request has leased stays until the request ends, whatever is unloaded, deleted or evicted meanwhile.
* A request by name or alias whose version is deleted between its resolution and its lease resolves again.

What is leased is never freed, and a model is measured once it is loaded. So both limits bound what is *kept*: while a
model loads, or more models are in use at the same time than fit, there may be more, until they are given back. Memory
is that of the models and of the caches of the sentences that they translate, as it is whenever a model is taken or
given back. Where it is too much, the caches of idle models go first, then the models.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass

from ferryman_service.application.ports import BundleLoader, LoadObserver, ModelStore, TranslationEngine
from ferryman_service.domain.errors import ModelDamaged, ModelNotFound, ModelTooLarge, ServerShuttingDown
from ferryman_service.domain.log_context import logging_with
from ferryman_service.domain.models import LoadedModel, ModelReference, ModelVersion
from ferryman_service.domain.translation import ComputeType


@dataclass(frozen=True, kw_only=True)
class LoadingLimits:
    """How many models are kept in memory, and how many bytes of it they may take together (0: no such limit)."""

    max_loaded_models: int = 4
    memory_bytes: int = 0

    def __post_init__(self) -> None:
        assert self.max_loaded_models >= 1, "at least one model must fit"
        assert self.memory_bytes >= 0, "memory_bytes must not be negative"


class _Slot:
    """A place for one model. `loading` guards the loading; all else belongs to LoadedModels and its lock.

    `leases` counts who uses the model or waits for its load. A slot that is retired takes no new leases; with the last
    one it is freed.
    """

    def __init__(self, version: ModelVersion) -> None:
        self.version = version
        self.loading = threading.Lock()
        self.translator: TranslationEngine | None = None
        self.memory_bytes = 0
        self.load_time_ns = 0
        self.compute_type = ComputeType.FP32
        self.leases = 0
        self.freed: Future[None] = Future()

    def cache_bytes(self) -> int:
        """Return what the caches of its sentences take now."""
        return 0 if self.translator is None else self.translator.cache_bytes()

    def describe(self) -> LoadedModel:
        return LoadedModel(
            reference=self.version.reference,
            memory_bytes=self.memory_bytes,
            load_time_ns=self.load_time_ns,
            compute_type=self.compute_type,
        )


class Lease:
    """A model in use, which stays until `release`: for those whose use no `with` block can enclose."""

    def __init__(self, loaded: LoadedModels, slot: _Slot) -> None:
        """Made by LoadedModels alone."""
        assert slot.translator is not None, "what is leased is loaded"
        self.version = slot.version
        self.engine = slot.translator
        self._loaded = loaded
        self._slot = slot

    def share(self) -> Lease:
        """Return another lease of the same model, to be released by itself; waits for nothing."""
        self._loaded._lend_again(self._slot)
        return Lease(self._loaded, self._slot)

    def release(self, executor: Executor) -> None:
        """Give the model back, once, and do not wait: if somebody has to free it now, then the executor."""
        if free := self._loaded._give_back(self._slot):
            try:
                executor.submit(_free, free)
            except RuntimeError:  # it is shut down: this process ends, and who waits now holds up nobody
                _free(free)


class LoadedModels:
    """The models in memory, the least recently used leaving first. Safe to use from every thread."""

    def __init__(
        self, models: ModelStore, loader: BundleLoader, limits: LoadingLimits, observer: LoadObserver | None = None
    ) -> None:
        """Store the ports; nothing is loaded yet. `observer` is told of every load."""
        self._models = models
        self._loader = loader
        self._limits = limits
        self._observer = observer
        self._lock = threading.Lock()
        self._slots: OrderedDict[str, _Slot] = OrderedDict()
        self._retired: set[_Slot] = set()
        self._closed = False

    @contextmanager
    def lease(self, version: ModelVersion) -> Iterator[TranslationEngine]:
        """Yield the version's translator, which stays open until the block ends.

        It is loaded and warmed up at most once however many ask at the same time. Raises ModelDamaged, ModelTooLarge,
        ServerShuttingDown, and ModelNotFound if the version was deleted meanwhile.
        """
        slot = self._acquire(version)
        try:
            assert slot.translator is not None, "what was acquired is loaded"
            yield slot.translator
        finally:
            self._release(slot)

    def acquire(self, reference: ModelReference, version: ModelVersion) -> Lease:
        """Return a lease of `version`, which the reference named just now, or, if it was deleted since, of what it
        names instead; waits for the load. Raises what `lease` does, but ModelNotFound only if the reference names
        nothing."""
        return Lease(self, self._acquire_reference(reference, version))

    def try_acquire(self, version: ModelVersion) -> Lease | None:
        """Return a lease if the version is in memory, else None. Waits for nothing: an event loop may call it."""
        with self._lock:
            slot = self._slots.get(version.reference)
            if slot is None or slot.translator is None:
                return None
            self._slots.move_to_end(version.reference)
            slot.leases += 1
            return Lease(self, slot)

    def load(self, version: ModelVersion) -> LoadedModel:
        """Load and warm up the version unless it is in memory; it counts as used now. Raises what `lease` does."""
        slot = self._acquire(version)
        try:
            return slot.describe()
        finally:
            self._release(slot)

    def unload(self, version: ModelVersion) -> Future[None] | None:
        """Take the version out of memory: it gets no new request, and is freed when those in flight have ended, which
        completes the future. None if it is not in memory. Does not wait; who asks for it again loads it again."""
        with self._lock:
            slot = self._slots.pop(version.reference, None)
            if slot is None:
                return None
            free = self._retire([slot])
        _free(free)
        return slot.freed

    def loaded(self) -> Sequence[LoadedModel]:
        """Return the models that are in memory, the most recently used first; not those that are being loaded, or
        unloaded."""
        with self._lock:
            return [slot.describe() for slot in reversed(self._slots.values()) if slot.translator is not None]

    def is_loaded(self, version: ModelVersion) -> bool:
        """Tell whether the version is in memory."""
        with self._lock:
            slot = self._slots.get(version.reference)
            return slot is not None and slot.translator is not None

    def close(self) -> None:
        """Free everything, now or when its last lease ends, and refuse new leases."""
        with self._lock:
            self._closed = True
            slots = list(self._slots.values())
            self._slots.clear()
            free = self._retire(slots)
        _free(free)

    def _acquire_reference(self, reference: ModelReference, version: ModelVersion) -> _Slot:
        while True:
            try:
                return self._acquire(version)
            except ModelNotFound:
                # Deleted since; nothing is deleted while something names it, so the name has moved on, or is gone too.
                before, version = version, self._models.resolve(reference)
                if version == before:
                    raise

    def _acquire(self, version: ModelVersion) -> _Slot:
        """Return the version's slot, loaded, with one more lease."""
        with self._lock:
            if self._closed:
                raise ServerShuttingDown("the server is stopping: call again, another one or the next goes on")
            slot = self._slots.setdefault(version.reference, _Slot(version))
            self._slots.move_to_end(version.reference)
            slot.leases += 1
            free = self._over_limits()
        _free(free)
        try:
            with slot.loading:
                if slot.translator is None:
                    with logging_with(model=slot.version.reference):
                        self._load_observed(slot)
        except BaseException:
            self._release(slot)
            raise
        return slot

    def _lend_again(self, slot: _Slot) -> None:
        with self._lock:
            assert slot.leases > 0, "only what is leased is shared: it may be out of the table"
            slot.leases += 1

    def _release(self, slot: _Slot) -> None:
        _free(self._give_back(slot))

    def _give_back(self, slot: _Slot) -> list[_Slot]:
        """Take a lease back, and return the slots that must now be freed, by a caller without the lock."""
        with self._lock:
            slot.leases -= 1
            if slot.leases == 0 and slot.translator is None and self._slots.get(slot.version.reference) is slot:
                del self._slots[slot.version.reference]  # its load has failed: the next caller tries again
            if slot.leases == 0 and slot in self._retired:
                self._retired.remove(slot)
                return [slot]
            return self._over_limits()

    def _load_observed(self, slot: _Slot) -> None:
        try:
            self._load(slot)
        except ModelNotFound:
            raise  # it was deleted meanwhile: nothing is wrong with it
        except BaseException:
            if self._observer is not None:
                self._observer.failed()
            raise
        if self._observer is not None:
            self._observer.loaded(slot.load_time_ns / 1e9)

    def _load(self, slot: _Slot) -> None:
        """Fill the slot, or leave it empty and raise."""
        began_ns = time.monotonic_ns()
        translator = self._read(slot.version)
        try:
            memory_bytes, budget = translator.memory_bytes(), self._limits.memory_bytes
            if budget and memory_bytes > budget:
                raise ModelTooLarge(
                    f"{slot.version.reference} takes {memory_bytes:,} bytes of memory, this server keeps at most "
                    f"{budget:,} bytes of models (--model-memory-mib): use another server, or a smaller model",
                    model=slot.version.reference,
                    memory_bytes=memory_bytes,
                    budget_bytes=budget,
                )
            translator.warm_up()
        except BaseException:
            translator.close()
            raise
        with self._lock:
            slot.memory_bytes, slot.load_time_ns = memory_bytes, time.monotonic_ns() - began_ns
            slot.compute_type = translator.compute_type()
            slot.translator = translator
            free = self._over_limits()
        _free(free)

    def _read(self, version: ModelVersion) -> TranslationEngine:
        try:
            return self._loader.load(self._models.published_bundle(version))
        except ModelDamaged:
            # What is missing may be missing because it was deleted: then this says so.
            self._models.resolve(ModelReference(name=version.name, version=version.version))
            raise

    def _over_limits(self) -> list[_Slot]:
        """Take out the least recently used models that nobody leases, as far as the limits want, and return them."""
        free: list[_Slot] = []
        budget = self._limits.memory_bytes
        memory_bytes = self._memory_bytes() if budget else 0
        for reference, slot in list(self._slots.items()):
            too_many = len(self._slots) > self._limits.max_loaded_models
            too_much = 0 < budget < memory_bytes
            if not (too_many or too_much):
                break
            if slot.leases == 0:
                del self._slots[reference]
                memory_bytes -= slot.memory_bytes
                free.append(slot)
        return free

    def _memory_bytes(self) -> int:
        """Return how much memory all models take; where that is too much, without the caches of idle ones, which go."""
        in_memory = [*self._retired, *self._slots.values()]
        models = sum(slot.memory_bytes for slot in in_memory)
        caches = {slot: slot.cache_bytes() for slot in in_memory}
        if models + sum(caches.values()) <= self._limits.memory_bytes:
            return models + sum(caches.values())
        for slot in in_memory:
            if slot.leases == 0 and slot.translator is not None:
                slot.translator.drop_caches()
        return models + sum(size for slot, size in caches.items() if slot.leases)

    def _retire(self, slots: Sequence[_Slot]) -> list[_Slot]:
        """Let the slots, which are in the table no more, be freed with their last lease; return those without any."""
        self._retired.update(slot for slot in slots if slot.leases)
        return [slot for slot in slots if not slot.leases]


def _free(slots: Sequence[_Slot]) -> None:
    """Free models that nobody leases and nobody can find any more; called without the lock."""
    for slot in slots:
        if slot.translator is not None:
            slot.translator.close()
        slot.freed.set_result(None)
