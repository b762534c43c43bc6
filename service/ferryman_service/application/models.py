"""The use cases of published models."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from ferryman_service.application.loaded_models import Lease, LoadedModels
from ferryman_service.application.paging import Page, Pager
from ferryman_service.application.ports import BundleReader, ModelStore
from ferryman_service.domain.errors import InvalidRequest, ModelNotFound, RoleNotServed, RowUnreadable, Violation
from ferryman_service.domain.ids import is_alias, is_model_name
from ferryman_service.domain.models import (
    LoadedModel,
    Model,
    ModelReference,
    ModelVersion,
    parse_exact_reference,
    parse_model_reference,
)

_LOADING_THREADS: Final = 2
_WRITING_THREADS: Final = 2
_NAME: Final = '1 to 64 of a-z, 0-9, "-", "_" and ".", the first a letter or digit'


class ModelUseCases:
    """What ModelService does."""

    def __init__(self, *, models: ModelStore, loaded: LoadedModels | None, pager: Pager) -> None:
        """Store the ports; without loaded models this process does not translate."""
        self._models = models
        self._loaded = loaded
        self._pager = pager
        # Loads take seconds: threads of their own keep them from holding up the calls that take none.
        self._loading = ThreadPoolExecutor(max_workers=_LOADING_THREADS, thread_name_prefix="load")
        # And a change to the database may have to wait for another writer.
        self._writing = ThreadPoolExecutor(max_workers=_WRITING_THREADS, thread_name_prefix="alias")

    def get(self, reference: str) -> tuple[Model, ModelVersion]:
        """Return a model and the version that is named; raises InvalidRequest, ModelNotFound."""
        parsed = parse_model_reference(reference)
        version = self._models.resolve(parsed)
        return self._models.get(parsed.name), version

    def list_page(self, page_size: int, page_token: str, takes: Callable[[Model], bool]) -> Page[Model]:
        """Return a page of models, by name; `takes` is the Pager's."""
        return self._pager.page(
            listing="models",
            page_size=page_size,
            page_token=page_token,
            fetch=self._models.list_page,
            key_of=lambda model: model.name,
            takes=takes,
        )

    async def set_alias(self, name: str, alias: str, version: int) -> Model:
        """Let the alias point at the version. If its present target is in memory here, the new one is loaded and warmed
        up before the alias moves.

        Raises InvalidRequest, ModelNotFound, TooManyAliases; then, and the alias stays, ModelDamaged, ModelTooLarge.
        """
        violations = [*_name_violations(name, alias), *_version_violations(version)]
        if violations:
            raise InvalidRequest(violations)
        loop = asyncio.get_running_loop()
        target = await asyncio.to_thread(self._models.resolve, ModelReference(name=name, version=version))
        if self._loaded is None or not await asyncio.to_thread(self._is_loaded, ModelReference(name=name, alias=alias)):
            return await loop.run_in_executor(self._writing, self._models.set_alias, name, alias, version)
        threads = self._writing if self._loaded.is_loaded(target) else self._loading
        return await loop.run_in_executor(threads, self._move_alias, target, alias)

    def delete_alias(self, name: str, alias: str) -> None:
        """Remove the alias; raises InvalidRequest, ModelNotFound."""
        violations = list(_name_violations(name, alias))
        if violations:
            raise InvalidRequest(violations)
        self._models.delete_alias(name, alias)

    def delete_version(self, reference: str) -> None:
        """Remove the version that is named exactly; requests that it serves go on to their end.

        Raises InvalidRequest, ModelNotFound, ModelInUse.
        """
        parsed = parse_exact_reference(reference)
        assert parsed.version is not None, "an exact reference has a version"
        try:
            version = self._models.resolve(parsed)
        except RowUnreadable:
            version = None  # such a one is deleted all the same; what is in memory leaves when its place is needed
        self._models.delete_version(parsed.name, parsed.version)
        if self._loaded is not None and version is not None:
            # After the files are gone: whoever loads it from now on learns that there is no such version.
            self._loaded.unload(version)

    def open_bundle(self, reference: str) -> BundleReader:
        """Open the files of the version that is named; raises InvalidRequest, ModelNotFound, ModelDamaged."""
        return self._models.open_bundle(self._models.resolve(parse_model_reference(reference)))

    async def load(self, reference: str) -> LoadedModel:
        """Load and warm up the version that is named, unless it is in memory.

        Raises RoleNotServed, InvalidRequest, ModelNotFound, ModelDamaged, ModelTooLarge.
        """
        loaded = self._served()
        parsed = parse_model_reference(reference)
        work = asyncio.get_running_loop().run_in_executor(
            self._loading, lambda: loaded.load(self._models.resolve(parsed))
        )
        return await work

    async def unload(self, reference: str) -> bool:
        """Take the version that is named out of memory, wait until the requests that it serves have ended, and tell
        whether it was there.

        Raises RoleNotServed, InvalidRequest, ModelNotFound.
        """
        loaded = self._served()
        version = await asyncio.to_thread(self._models.resolve, parse_model_reference(reference))
        freed = await asyncio.to_thread(loaded.unload, version)
        if freed is None:
            return False
        await asyncio.shield(asyncio.wrap_future(freed))  # a caller that gives up does not keep it from being freed
        return True

    def loaded(self) -> Sequence[LoadedModel]:
        """Return the models in memory, the most recently used first; raises RoleNotServed."""
        return self._served().loaded()

    def close(self) -> None:
        """Wait for the load and the change in hand."""
        for threads in (self._loading, self._writing):
            threads.shutdown(wait=True, cancel_futures=True)

    def _move_alias(self, target: ModelVersion, alias: str) -> Model:
        """Move the alias with its new target in memory, so that no request by the alias waits for a load; the present
        one keeps its memory until then."""
        with contextlib.ExitStack() as present:
            if lease := self._lease_in_memory(ModelReference(name=target.name, alias=alias)):
                present.callback(lease.release, self._loading)
            with self._served().lease(target):
                model = self._models.set_alias(target.name, alias, target.version)
                present.close()  # now: it must be the first to leave if there is no room for both
                return model

    def _is_loaded(self, reference: ModelReference) -> bool:
        lease = self._lease_in_memory(reference)
        if lease is not None:
            lease.release(self._loading)
        return lease is not None

    def _lease_in_memory(self, reference: ModelReference) -> Lease | None:
        """Return a lease of what the reference names, if it names anything and that is in memory."""
        try:
            return self._served().try_acquire(self._models.resolve(reference))
        except (ModelNotFound, RowUnreadable):
            return None

    def _served(self) -> LoadedModels:
        if self._loaded is None:
            raise RoleNotServed(
                "this server does not translate, so it loads no models; start one with --roles translation",
                role="translation",
            )
        return self._loaded


def _name_violations(name: str, alias: str) -> Iterator[Violation]:
    if not is_model_name(name):
        text = f"is {name[:80]!r}, must be {_NAME}"
        yield Violation(field="name", description=text, reason="INVALID_MODEL_NAME")
    if not is_alias(alias):
        text = f"is {alias[:80]!r}, must be {_NAME}, and not digits only"
        yield Violation(field="alias", description=text, reason="INVALID_ALIAS")


def _version_violations(version: int) -> Iterator[Violation]:
    if version < 1:
        text = f"is {version}, must be the number of a version, from 1; DeleteModelAlias removes an alias"
        yield Violation(field="version", description=text, reason="OUT_OF_RANGE")
