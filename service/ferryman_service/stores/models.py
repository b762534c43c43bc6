"""Published models: their bundles in folders, their rows in SQL."""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection, Engine, Row, func, insert, select

from ferryman_service.bundle.manifest import (
    CONTENT_FILES,
    MANIFEST_FILE,
    SUBWORDS_FILE,
    WEIGHTS_FILE,
    bundle_size_bytes,
    manifest_digest,
    read_manifest,
    verify,
)
from ferryman_service.domain.errors import AttemptFenced, InvalidRequest, ModelDamaged, ModelNotFound, Violation
from ferryman_service.domain.ids import is_model_name
from ferryman_service.domain.models import Model, ModelLineage, ModelReference, ModelScores, ModelVersion
from ferryman_service.domain.recipe import recipe_from_dict, recipe_to_dict
from ferryman_service.domain.records import RunState
from ferryman_service.domain.training import RunCancelled
from ferryman_service.stores import tables
from ferryman_service.stores.database import disk_errors, reading, writing
from ferryman_service.stores.folders import HeldFolder, remove_abandoned, remove_folder, sync_folder
from ferryman_service.stores.layout import DataFolder
from ferryman_service.stores.run_rows import check_attempt, enter_state, lock_head

_VERSIONS: Final = tables.model_versions
_UNFINISHED: Final = [state.value for state in RunState if not state.is_terminal]
_READ_ONLY: Final = 0o444


class FileModelStore:
    """The ModelStore. A bundle moves into place in the transaction that inserts its row. A folder without a row is what
    a crash in between has left: it is not published, and gives way to the next bundle of its number."""

    def __init__(self, engine: Engine, folder: DataFolder) -> None:
        self._engine = engine
        self._folder = folder

    def recover(self) -> None:
        """Remove bundles in the making that nobody will publish; call it when a service starts."""
        remove_abandoned(self._folder.imports)
        with writing(self._engine) as connection:
            query = select(tables.runs.c.run_id).where(tables.runs.c.state.in_(_UNFINISHED))
            unfinished = set(connection.execute(query).scalars())
            for path in self._folder.staging.iterdir():
                if path.name not in unfinished:
                    remove_folder(path)

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
        verify(bundle)
        with disk_errors(), ExitStack() as undo:
            held = HeldFolder(self._folder.imports)
            undo.callback(held.release)
            staged = held.path / "bundle"
            _copy_bundle(bundle, staged)
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
        query = select(_VERSIONS).where(_VERSIONS.c.name == reference.name)
        if reference.version is not None:
            query = query.where(_VERSIONS.c.version == reference.version)
        with reading(self._engine) as connection:
            row = connection.execute(query.order_by(_VERSIONS.c.version.desc()).limit(1)).one_or_none()
        if row is None:
            raise _model_not_found(reference)
        return _version_from_row(row)

    def get(self, name: str) -> Model:
        """Return the model; raises ModelNotFound."""
        with reading(self._engine) as connection:
            models = _read_models(connection, [name])
        if not models:
            raise _model_not_found(ModelReference(name=name))
        return models[0]

    def list_page(self, after: str | None, limit: int) -> Sequence[Model]:
        """Return the models that follow `after`, by name, at most `limit`."""
        query = select(_VERSIONS.c.name).distinct().order_by(_VERSIONS.c.name).limit(limit)
        if after is not None:
            query = query.where(_VERSIONS.c.name > after)
        with reading(self._engine) as connection:
            return _read_models(connection, connection.execute(query).scalars().all())

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
        connection.execute(insert(_VERSIONS).values(_version_to_values(version)))
        target = self.bundle_dir(version)
        remove_folder(target)
        target.parent.mkdir(exist_ok=True)
        sync_folder(self._folder.models)
        staged.rename(target)
        undo.callback(target.rename, staged)
        sync_folder(target.parent)


def _describe(connection: Connection, name: str, staged: Path) -> ModelVersion:
    """Return what the staged bundle becomes: the next version of the model."""
    latest = connection.execute(select(func.max(_VERSIONS.c.version)).where(_VERSIONS.c.name == name)).scalar_one()
    header = read_manifest(staged).header
    return ModelVersion(
        name=name,
        version=(latest or 0) + 1,
        lineage=header.lineage,
        scores=header.scores,
        parameters=header.parameters,
        size_bytes=bundle_size_bytes(staged),
        digest=manifest_digest(staged),
        create_time_ns=time.time_ns(),
    )


def _read_models(connection: Connection, names: Sequence[str]) -> list[Model]:
    query = select(_VERSIONS).where(_VERSIONS.c.name.in_(names)).order_by(_VERSIONS.c.name, _VERSIONS.c.version)
    models = []
    for name, group in itertools.groupby(connection.execute(query), key=lambda row: row.name):
        rows = list(group)
        latest = _version_from_row(rows[-1])
        models.append(Model(name=name, latest_version=latest, versions=tuple(row.version for row in rows)))
    return models


def _version_to_values(version: ModelVersion) -> dict[str, Any]:
    values = dataclasses.asdict(version)
    values["lineage"]["recipe"] = recipe_to_dict(version.lineage.recipe)
    return values


def _version_from_row(row: Row[Any]) -> ModelVersion:
    return ModelVersion(
        name=row.name,
        version=row.version,
        lineage=ModelLineage(**row.lineage | {"recipe": recipe_from_dict(row.lineage["recipe"])}),
        scores=ModelScores(**row.scores),
        parameters=row.parameters,
        size_bytes=row.size_bytes,
        digest=row.digest,
        create_time_ns=row.create_time_ns,
    )


def _model_not_found(reference: ModelReference) -> ModelNotFound:
    name = reference.name if reference.version is None else f"{reference.name}/{reference.version}"
    return ModelNotFound(f"there is no model {name!r}: ListModels names those there are", model=name)


def _make_read_only(bundle: Path) -> None:
    for path in bundle.iterdir():
        path.chmod(_READ_ONLY)


def _copy_bundle(bundle: Path, staged: Path) -> None:
    staged.mkdir()
    weights = (WEIGHTS_FILE,) if (bundle / WEIGHTS_FILE).exists() else ()
    for name in (*CONTENT_FILES, *weights, MANIFEST_FILE):
        with (bundle / name).open("rb") as source, (staged / name).open("xb") as copy:
            shutil.copyfileobj(source, copy)
            copy.flush()
            os.fsync(copy.fileno())
    sync_folder(staged)
