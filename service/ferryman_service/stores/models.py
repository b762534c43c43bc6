"""Published models: their bundles in folders, their rows in SQL."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from sqlalchemy import Connection, Engine, delete, select

from ferryman_service.bundle.manifest import (
    MANIFEST_FILE,
    SUBWORDS_FILE,
    WEIGHTS_FILE,
    bundle_size_bytes,
    manifest_digest,
    read_manifest,
    verify,
)
from ferryman_service.domain.errors import AttemptFenced, InvalidRequest, ModelDamaged, ModelInUse, Violation
from ferryman_service.domain.ids import RUN_PREFIX, is_id, is_model_name
from ferryman_service.domain.models import Model, ModelReference, ModelVersion
from ferryman_service.domain.records import RunState
from ferryman_service.domain.training import RunCancelled
from ferryman_service.stores import tables
from ferryman_service.stores.bundle_reader import BundleReader
from ferryman_service.stores.database import disk_errors, reading, writing
from ferryman_service.stores.folders import HeldFolder, own_folders, remove_abandoned, remove_folder, sync_folder
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
from ferryman_service.stores.run_rows import check_attempt, enter_state, lock_head
from ferryman_service.stores.sqlite import ChangeCounter

_VERSIONS: Final = tables.model_versions
_ALIASES: Final = tables.model_aliases
_UNFINISHED: Final = [state.value for state in RunState if not state.is_terminal]
_READ_ONLY: Final = 0o444


class FileModelStore:
    """The ModelStore. A bundle moves into place in the transaction that inserts its row, and leaves after the one that
    deletes it. A folder without a row is what a crash in between has left: it is not published, gives way to the next
    bundle of its number, and is removed when a service starts."""

    def __init__(self, engine: Engine, folder: DataFolder) -> None:
        self._engine = engine
        self._folder = folder
        self._changes = ChangeCounter(engine)

    def recover(self) -> None:
        """Remove bundles that nobody will publish, and those of deleted versions; call it when a service starts."""
        remove_abandoned(self._folder.imports)
        with writing(self._engine) as connection:
            query = select(tables.runs.c.run_id).where(tables.runs.c.state.in_(_UNFINISHED))
            unfinished = set(connection.execute(query).scalars())
            for path in own_folders(self._folder.staging, lambda name: is_id(name, RUN_PREFIX)):
                if path.name not in unfinished:
                    remove_folder(path)
            note_nameless(connection)
            for name, number, path in self._folder.bundles():
                here = (_VERSIONS.c.name == name) & (_VERSIONS.c.version == number)
                if connection.execute(select(_VERSIONS.c.name).where(here)).one_or_none() is None:
                    self._remove_bundle(path)

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
        with disk_errors(), ExitStack() as undo:
            _make_read_only(staged)
            with writing(self._engine) as connection:
                head = lock_head(connection, run_id)
                check_attempt(head, attempt)
                if RunState(head.state) is not RunState.EXPORTING:
                    text = f"attempt {attempt} of run {run_id} may not publish: the run is {head.state}, not exporting"
                    raise AttemptFenced(text, run_id=run_id, attempt=attempt)
                if head.cancel_requested:
                    raise RunCancelled(run_id)
                version = _describe(connection, head.model_name, staged)
                assert version.lineage.run_id == run_id, f"the bundle is of run {version.lineage.run_id}"
                changes = {"model_version": version.version}
                enter_state(connection, head, RunState.SUCCEEDED, f"published {version.reference}", changes)
                self._publish(connection, version, staged, undo)
            undo.pop_all()
        return version

    def import_bundle(self, bundle: Path, name: str) -> ModelVersion:
        """Copy a bundle from elsewhere, check it, publish it. Raises ModelDamaged, InvalidRequest."""
        if not is_model_name(name):
            text = f'is {name[:80]!r}, must be 1 to 64 of a-z, 0-9, "-", "_", ".", beginning with a letter or digit'
            raise InvalidRequest([Violation(field="name", description=text, reason="INVALID_MODEL_NAME")])
        files = verify(bundle).files
        with disk_errors(), ExitStack() as undo:
            held = HeldFolder(self._folder.imports)
            undo.callback(held.release)
            staged = held.path / "bundle"
            _copy_bundle(bundle, [*files, MANIFEST_FILE], staged)
            verify(staged)  # the copy is what gets published
            _make_read_only(staged)
            with writing(self._engine) as connection:
                version = _describe(connection, name, staged)
                self._publish(connection, version, staged, undo)
            undo.pop_all()
            held.release()
        return version

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
        bundle = self.bundle_dir(version)
        if WEIGHTS_FILE not in verify(bundle).files:
            raise ModelDamaged(f"{version.reference} holds no {WEIGHTS_FILE}", file=WEIGHTS_FILE)
        return bundle / WEIGHTS_FILE, bundle / SUBWORDS_FILE

    def bundle_dir(self, version: ModelVersion) -> Path:
        """Return the folder of the published bundle."""
        return self._folder.bundle_dir(version.name, version.version)

    def _publish(self, connection: Connection, version: ModelVersion, staged: Path, undo: ExitStack) -> None:
        """Insert the row and move the folder; `undo` moves it back if the transaction fails afterwards."""
        insert_version(connection, version)
        target = self.bundle_dir(version)
        remove_folder(target)
        target.parent.mkdir(exist_ok=True)
        sync_folder(self._folder.models)
        staged.rename(target)
        undo.callback(target.rename, staged)
        sync_folder(target.parent)

    def _remove_bundle(self, bundle: Path) -> None:
        """Remove a bundle that has no row. Whoever moves it aside removes it: two may try at the same time."""
        try:
            held = HeldFolder(self._folder.imports)
        except OSError:  # a full disk may have no room for a folder, and what is removed here may be what fills it
            remove_folder(bundle)
            return
        try:
            with contextlib.suppress(FileNotFoundError):
                bundle.rename(held.path / "deleted")
        finally:
            held.release()


def _describe(connection: Connection, name: str, staged: Path) -> ModelVersion:
    """Return what the staged bundle becomes: the next version of the model."""
    manifest = read_manifest(staged)
    header = manifest.header
    return ModelVersion(
        name=name,
        version=next_version(connection, name),
        lineage=header.lineage,
        scores=header.scores,
        parameters=header.parameters,
        size_bytes=bundle_size_bytes(staged),
        digest=manifest_digest(staged),
        create_time_ns=time.time_ns(),
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
        path.chmod(_READ_ONLY)


def _copy_bundle(bundle: Path, names: Sequence[str], staged: Path) -> None:
    """Copy the files of a bundle; `names` are those of a checked manifest, which has no others than a bundle's own."""
    staged.mkdir()
    for name in names:
        with (bundle / name).open("rb") as source, (staged / name).open("xb") as copy:
            shutil.copyfileobj(source, copy)
            copy.flush()
            os.fsync(copy.fileno())
    sync_folder(staged)
