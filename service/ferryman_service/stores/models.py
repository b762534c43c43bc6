"""Published models: their bundles in folders, their rows in SQL."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Final

from sqlalchemy import Connection, Engine, delete, select

from ferryman_service.bundle.manifest import (
    SUBWORDS_FILE,
    WEIGHTS_FILE,
    bundle_size_bytes,
    copy_verified,
    manifest_digest,
    read_manifest,
    verify,
)
from ferryman_service.domain.cleanup import clean_up
from ferryman_service.domain.errors import AttemptFenced, InvalidRequest, ModelDamaged, ModelInUse, Violation
from ferryman_service.domain.ids import RUN_PREFIX, is_id, is_model_name
from ferryman_service.domain.models import Model, ModelReference, ModelVersion
from ferryman_service.domain.records import ACTIVE_STATES, RunState
from ferryman_service.domain.training import RunCancelled
from ferryman_service.stores import tables
from ferryman_service.stores.bundle_reader import BundleReader, check_manifest
from ferryman_service.stores.database import disk_errors, reading, writing
from ferryman_service.stores.folders import (
    HeldFolder,
    own_folders,
    remove_abandoned,
    remove_folder,
    sync_folder,
)
from ferryman_service.stores.free_space import FreeSpace
from ferryman_service.stores.layout import DataFolder
from ferryman_service.stores.model_rows import (
    NUMBERED,
    aliases_of,
    check_alias,
    find_number,
    find_version,
    insert_version,
    next_version,
    note_nameless,
    put_alias,
    read_models,
)
from ferryman_service.stores.pending import FolderChange, announce, announced, withdraw
from ferryman_service.stores.run_rows import check_attempt, enter_state, lock_head
from ferryman_service.stores.sqlite import ChangeCounter
from ferryman_service.trash import move_to_trash

_VERSIONS: Final = tables.model_versions
_ALIASES: Final = tables.model_aliases
_UNFINISHED: Final = [state.value for state in RunState if not state.is_terminal]
_READ_ONLY: Final = 0o555


class FileModelStore:
    """The ModelStore. A bundle moves into place in the transaction that inserts its row, and leaves after the one that
    deletes it. Both are announced (pending.py), so `sweep` knows what a crash in between has left."""

    def __init__(
        self,
        engine: Engine,
        folder: DataFolder,
        space: FreeSpace | None = None,
        *,
        examine: Callable[[Path], None] | None = None,
    ) -> None:
        """Store the parts. `space` is asked before a bundle is copied, None: the folder's disk with the mark by
        default. `examine` raises ModelDamaged for an imported bundle that cannot or must not be loaded; without it
        nothing can be imported."""
        self._engine = engine
        self._space = space or FreeSpace(folder.root)
        self._folder = folder
        self._examine = examine
        self._changes = ChangeCounter(engine)

    def recover(self) -> None:
        """Remove what copies of bundles that never ended have left, and note the rows that nothing can name; call it
        when a service starts."""
        remove_abandoned(self._folder.imports)
        with reading(self._engine) as connection:
            note_nameless(connection)

    def sweep(self) -> None:
        """Remove what imports and exports that ended have left; harmless at any time."""
        remove_abandoned(self._folder.imports)
        staged = own_folders(self._folder.staging, lambda name: is_id(name, RUN_PREFIX))
        clean_up(*(partial(self._remove_ended_staging, path) for path in staged))

    def staging_dir(self, run_id: str) -> Path:
        """Return an empty folder to write a run's bundle into."""
        path = self._folder.staging_dir(run_id)
        with disk_errors():
            remove_folder(path)
            path.mkdir(parents=True)
        return path

    def discard_staging(self, run_id: str) -> None:
        """Remove what was staged for the run."""
        remove_folder(self._folder.staging_dir(run_id))

    def publish(self, run_id: str, attempt: int, staged: Path) -> ModelVersion:
        """Publish the staged bundle and make the run SUCCEEDED, together or not at all.

        Raises AttemptFenced; RunCancelled if a cancellation was acknowledged before.
        """

        def end_run(connection: Connection, version: ModelVersion) -> None:
            head = lock_head(connection, run_id)
            check_attempt(head, attempt)
            if RunState(head.state) is not RunState.EXPORTING:
                text = f"attempt {attempt} of run {run_id} may not publish: the run is {head.state}, not exporting"
                raise AttemptFenced(text, run_id=run_id, attempt=attempt)
            if head.cancel_requested:
                raise RunCancelled(run_id)
            assert version.lineage.run_id == run_id, f"the bundle is of run {version.lineage.run_id}"
            changes = {"model_version": version.version}
            enter_state(connection, head, RunState.SUCCEEDED, f"published {version.reference}", changes)

        with disk_errors():
            with reading(self._engine) as connection:
                name = lock_head(connection, run_id).model_name
            _make_read_only(staged)
            return self._publish(name, staged, end_run)

    def import_bundle(self, bundle: Path, name: str) -> ModelVersion:
        """Copy a bundle from elsewhere, examine the copy, publish it. Raises DiskFull, ModelDamaged,
        InvalidRequest."""
        assert self._examine is not None, "a bundle from elsewhere is examined before it is published"
        if not is_model_name(name):
            text = f'is {name[:80]!r}, must be 1 to 64 of a-z, 0-9, "-", "_", ".", beginning with a letter or digit'
            raise InvalidRequest([Violation(field="name", description=text, reason="INVALID_MODEL_NAME")])
        self._space.require(bundle_size_bytes(bundle))
        with disk_errors(), ExitStack() as undo:
            held = HeldFolder(self._folder.imports)
            undo.callback(held.release)
            staged = held.path / "bundle"
            copy_verified(bundle, staged)
            self._examine(staged)
            _make_read_only(staged)
            return self._publish(name, staged, lambda connection, version: None)

    def resolve(self, reference: ModelReference) -> ModelVersion:
        """Return the version that the reference names; raises ModelNotFound."""
        with reading(self._engine) as connection:
            return find_version(connection, reference)

    def revision(self) -> int:
        """Return a number that is another one after any change to the database, and never blocks."""
        return self._changes.value()

    def get(self, name: str) -> Model:
        """Return the model; raises ModelNotFound."""
        with reading(self._engine) as connection:
            if not (models := read_models(connection, [name])):
                find_version(connection, ModelReference(name=name))  # says why
            [model] = models
        return model

    def list_page(self, after: str | None, limit: int) -> Sequence[Model]:
        """Return the models that follow `after`, by name, at most `limit`."""
        query = select(_VERSIONS.c.name).where(NUMBERED).distinct().order_by(_VERSIONS.c.name).limit(limit)
        if after is not None:
            query = query.where(_VERSIONS.c.name > after)
        with reading(self._engine) as connection:
            return read_models(connection, connection.execute(query).scalars().all())

    def set_alias(self, name: str, alias: str, version: int) -> Model:
        """Let the alias point at the version, at once for everybody, and return the model; raises ModelNotFound."""
        with writing(self._engine) as connection:
            find_number(connection, name, version)
            target = find_version(connection, ModelReference(name=name, version=version))
            put_alias(connection, target, alias)
            [model] = read_models(connection, [name])
        return model

    def delete_alias(self, name: str, alias: str) -> None:
        """Remove the alias, not what it points at; raises ModelNotFound."""
        with writing(self._engine) as connection:
            check_alias(connection, name, alias)
            connection.execute(delete(_ALIASES).where(_ALIASES.c.name == name, _ALIASES.c.alias == alias))

    def delete_version(self, name: str, version: int) -> None:
        """Remove a version, first its row, then its files; its number is never given again.

        Raises ModelNotFound; ModelInUse if an alias points at it or an unfinished run starts from it.
        """
        with writing(self._engine) as connection:
            find_number(connection, name, version)
            _check_not_in_use(connection, name, version)
            connection.execute(delete(_VERSIONS).where(_VERSIONS.c.name == name, _VERSIONS.c.version == version))
            announce(connection, self._folder.relative(self._folder.bundle_dir(name, version)), FolderChange.DELETING)
        self._remove_bundle(self._folder.bundle_dir(name, version))

    def open_bundle(self, version: ModelVersion) -> BundleReader:
        """Open the published files for reading; raises ModelDamaged, and ModelNotFound if it was deleted meanwhile."""
        try:
            return BundleReader(version, self.bundle_dir(version))
        except ModelDamaged:
            self.resolve(ModelReference(name=version.name, version=version.version))
            raise

    def has_weights(self, version: ModelVersion) -> bool:
        """Tell whether the bundle holds the weights that training can start from."""
        return (self.bundle_dir(version) / WEIGHTS_FILE).exists()

    def weights(self, version: ModelVersion) -> tuple[Path, Path]:
        """Return the checked weights and subword model; raises ModelDamaged."""
        bundle = self.published_bundle(version)
        if WEIGHTS_FILE not in verify(bundle).files:
            raise ModelDamaged(f"{version.reference} holds no {WEIGHTS_FILE}", file=WEIGHTS_FILE)
        return bundle / WEIGHTS_FILE, bundle / SUBWORDS_FILE

    def bundle_dir(self, version: ModelVersion) -> Path:
        """Return the folder of the published bundle."""
        return self._folder.bundle_dir(version.name, version.version)

    def published_bundle(self, version: ModelVersion) -> Path:
        """Return the folder of the bundle, whose manifest is the one that was published; raises ModelDamaged.

        The manifest holds the digest of every other file.
        """
        bundle = self.bundle_dir(version)
        check_manifest(version, bundle)
        return bundle

    def _publish(self, name: str, staged: Path, accept: Callable[[Connection, ModelVersion], None]) -> ModelVersion:
        """Move a bundle into place in the transaction that inserts its row, and in which `accept` may refuse it."""
        while True:
            number = self._announce_next(name)
            with ExitStack() as undo:
                with writing(self._engine) as connection:
                    if self._is_taken(connection, name, number):
                        continue  # somebody else has published in the meantime
                    version = describe_bundle(name, number, staged, time.time_ns())
                    accept(connection, version)
                    insert_version(connection, version)
                    target = self.bundle_dir(version)
                    withdraw(connection, self._folder.relative(target))
                    move_to_trash(self._folder.trash, target, "its publication was interrupted")
                    target.parent.mkdir(exist_ok=True)
                    sync_folder(self._folder.models)
                    staged.rename(target)
                    undo.callback(clean_up, partial(target.rename, staged))
                    sync_folder(target.parent)
                undo.pop_all()
            return version

    def _announce_next(self, name: str) -> int:
        """Return the number of the model's next version, announced. A folder that lies there without a row is left
        alone, and its number not used; unless it was announced: then it is of a publication that never ended."""
        with writing(self._engine) as connection:
            changes = announced(connection)
            number = next_version(connection, name)
            while True:
                path = self._folder.bundle_dir(name, number)
                leftover = changes.get(self._folder.relative(path)) is FolderChange.PUBLISHING
                if leftover or not os.path.lexists(path):
                    announce(connection, self._folder.relative(path), FolderChange.PUBLISHING)
                    return number
                number += 1

    def _is_taken(self, connection: Connection, name: str, number: int) -> bool:
        path = self._folder.relative(self._folder.bundle_dir(name, number))
        return number < next_version(connection, name) or path not in announced(connection)

    def _remove_bundle(self, bundle: Path) -> None:
        """Remove a bundle that has no row; raises nothing, for what is left was announced and is deleted later. Whoever
        moves it aside removes it: two may try at the same time."""
        try:
            held = HeldFolder(self._folder.imports)
        except OSError:  # a full disk may have no room for a folder, and what is removed here may be what fills it
            clean_up(partial(remove_folder, bundle))
            return
        try:
            bundle.rename(held.path / "deleted")
        except FileNotFoundError:
            pass
        except OSError:
            clean_up(partial(remove_folder, bundle))
        finally:
            held.release()

    def _remove_ended_staging(self, staged: Path) -> None:
        """Remove what an attempt that is over has staged: the next one begins with an empty folder. A folder without a
        run is left to the next start."""
        held = HeldFolder(self._folder.imports)
        try:
            with writing(self._engine) as connection:  # no attempt begins to export meanwhile
                query = select(tables.runs.c.state).where(tables.runs.c.run_id == staged.name)
                state = connection.execute(query).scalar_one_or_none()
                if state is not None and state not in ACTIVE_STATES:
                    staged.rename(held.path / "staged")
        finally:
            held.release()


def describe_bundle(name: str, number: int, bundle: Path, create_time_ns: int) -> ModelVersion:
    """Return the version that the bundle is, or becomes, under this name and number; raises ModelDamaged."""
    manifest = read_manifest(bundle)
    header = manifest.header
    return ModelVersion(
        name=name,
        version=number,
        lineage=header.lineage,
        scores=header.scores,
        parameters=header.parameters,
        size_bytes=bundle_size_bytes(bundle),
        digest=manifest_digest(bundle),
        create_time_ns=create_time_ns,
        int8=manifest.int8,
    )


def _check_not_in_use(connection: Connection, name: str, number: int) -> None:
    """Raise ModelInUse if the version may not go: what an alias names is loadable, and a run that was accepted to
    start from it reads its weights again whenever it is resumed."""
    reference = f"{name}/{number}"
    if aliases := aliases_of(connection, name, number):
        named = ", ".join(f"{name}@{alias}" for alias in aliases)
        text = f"{reference} is what {named} points at: move or delete that first"
        raise ModelInUse(text, model=reference, aliases=",".join(aliases))
    runs = tables.runs.c
    starts = (runs.initial_model == reference) & runs.state.in_(_UNFINISHED)
    needed_by = connection.execute(select(runs.run_id).where(starts).order_by(runs.run_id).limit(1)).scalar()
    if needed_by is not None:
        text = f"run {needed_by} starts from {reference}: wait until it has ended, or cancel it"
        raise ModelInUse(text, model=reference, needed_by=needed_by)


def _make_read_only(bundle: Path) -> None:
    for path in bundle.iterdir():
        path.chmod(path.stat().st_mode & _READ_ONLY)
