"""Bringing the database and the folders beside it together again.

Each step leaves a state that the next start, or the next repair, understands: a new database is made under another
name and takes its place when it is complete; the rows of a usable one come in one transaction; what cannot be described
goes to the trash last.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from sqlalchemy import Connection, insert

from ferryman_service.bundle.manifest import MANIFEST_FILE, Manifest, read_manifest, verify
from ferryman_service.domain.corpora import Corpus, CorpusHeader, Split
from ferryman_service.domain.errors import ModelDamaged
from ferryman_service.domain.models import ModelLineage, ModelVersion
from ferryman_service.domain.records import RunState, StateChange
from ferryman_service.domain.runs import TrainingRun
from ferryman_service.stores import tables
from ferryman_service.stores.corpora import insert_corpus
from ferryman_service.stores.corpus_description import (
    DESCRIPTION_FILE,
    find_damage,
    read_description,
    text_digest,
    write_description,
)
from ferryman_service.stores.corpus_text import CorpusLimits, check_split
from ferryman_service.stores.database import open_database, upgrade, writing
from ferryman_service.stores.folders import HeldFolder, sync_folder
from ferryman_service.stores.integrity import find_damage as find_database_damage
from ferryman_service.stores.layout import DataFolder
from ferryman_service.stores.lock import FolderInUse, FolderLock
from ferryman_service.stores.model_rows import insert_rebuilt_version
from ferryman_service.stores.models import describe_bundle
from ferryman_service.stores.pending import FolderChange, withdraw
from ferryman_service.stores.run_rows import add_records, run_to_values
from ferryman_service.stores.salvage import TABLES, insert_rows, read_rows
from ferryman_service.stores.sqlite import open_existing
from ferryman_service.stores.sweep import Contents, find_contents, is_new, rebuilt_database
from ferryman_service.trash import move_to_trash

_BUSY_TIMEOUT_S: Final = 10.0
_LOGS: Final = ("-wal", "-shm")
_INTERRUPTED: Final = {
    FolderChange.PUBLISHING.value: "its publication was interrupted",
    FolderChange.DELETING.value: "its deletion was interrupted",
    FolderChange.TO_TRASH.value: "its deletion was interrupted",
}


@dataclass(kw_only=True)
class _Plan:
    """What a repair does. `replaces`: why the database is made anew, "" if it is kept."""

    replaces: str
    versions: list[ModelVersion] = field(default_factory=list)
    corpora: list[tuple[Corpus, str | None]] = field(default_factory=list)
    runs: list[TrainingRun] = field(default_factory=list)
    trash: dict[Path, str] = field(default_factory=dict)

    def lines(self, folder: DataFolder) -> list[str]:
        lines = [f"{folder.database.name}: made anew, {self.replaces}"] if self.replaces else []
        lines += [f"models/{version.reference}: its row is rebuilt from its manifest" for version in self.versions]
        lines += [f"corpora/{corpus.corpus_id}: its row is rebuilt from its text" for corpus, _ in self.corpora]
        lines += [f"runs/{run.run_id}: its row is rebuilt from the model it made, without records" for run in self.runs]
        return lines + [f"{folder.relative(path)}: moved to the trash, {reason}" for path, reason in self.trash.items()]


def repair(folder: DataFolder, *, dry_run: bool) -> list[str]:
    """Rebuild the rows that are missing from what lies in the folders, and move to the trash what cannot be described.

    Return a line for each change; with `dry_run` nothing is changed. Raises FolderInUse, DatabaseTooNew,
    StoreUnavailable, DiskFull, OSError.
    """
    if dry_run:
        return _make_plan(folder).lines(folder)
    lock = FolderLock(folder.root / "training-service.lock")
    try:
        lock.acquire()
    except FolderInUse as error:
        raise FolderInUse(f"{folder.root} is in use: stop all services that use it, then repair it") from error
    try:
        if rebuilt_database(folder).exists():
            _put_in_place(folder)
        plan = _make_plan(folder)
        _apply(folder, plan)
        return plan.lines(folder)
    finally:
        lock.release()


def _apply(folder: DataFolder, plan: _Plan) -> None:
    for corpus, request_id in plan.corpora:
        target = folder.corpus_dir(corpus.corpus_id)
        if not (target / DESCRIPTION_FILE).exists():
            write_description(target, corpus, request_id)
    if plan.replaces:
        _rebuild(folder, plan)
        _put_in_place(folder)
    else:
        database = open_database(folder.database)
        try:
            upgrade(database)
            with writing(database) as connection:
                _insert(connection, plan)
        finally:
            database.dispose()
    for path, reason in plan.trash.items():
        move_to_trash(folder.trash, path, reason)
    if plan.trash:
        _withdraw(folder, plan)


def _make_plan(folder: DataFolder) -> _Plan:
    replaces = _why_replace(folder.database)
    keys = _Keys.read(folder.database)
    contents = find_contents(folder)
    plan = _Plan(replaces=replaces)
    lineages: dict[str, ModelLineage] = {}
    makers: dict[str, ModelVersion] = {}
    for path, (name, number) in contents.bundles.items():
        manifest = _manifest(path)
        if manifest is not None:
            lineages.setdefault(manifest.header.lineage.corpus_id, manifest.header.lineage)
        reference = folder.relative(path)
        if reference in keys.changes and reference not in keys.paths:
            plan.trash[path] = _INTERRUPTED[keys.changes[reference]]
        elif reference not in keys.paths:
            _plan_bundle(plan, path, name, number)
        if manifest is not None and path not in plan.trash:
            version = describe_bundle(name, number, path, (path / MANIFEST_FILE).stat().st_mtime_ns)
            makers.setdefault(version.lineage.run_id, version)
    _plan_corpora(folder, plan, contents, keys, lineages)
    for path, run_id in contents.runs.items():
        reference = folder.relative(path)
        if reference in keys.paths:
            continue
        if reference in keys.changes:
            plan.trash[path] = _INTERRUPTED[keys.changes[reference]]
        elif run_id in makers:
            plan.runs.append(_run_of(makers[run_id], path))
        else:
            plan.trash[path] = "its recipe is nowhere but in the row that is lost"
    return plan


@dataclass(frozen=True)
class _Keys:
    """Which folders have a row, and which changes are announced, as paths relative to the data folder."""

    paths: frozenset[str]
    changes: Mapping[str, str]

    @classmethod
    def read(cls, database: Path) -> _Keys:
        """Read what can be read; of a database that is new, nothing."""
        if is_new(database):
            return cls(frozenset(), {})
        with closing(open_existing(database, _BUSY_TIMEOUT_S)) as connection:
            versions = read_rows(connection, "model_versions")
            paths = {f"models/{row['name']}/{row['version']}" for row in versions}
            paths |= {f"corpora/{row['corpus_id']}" for row in read_rows(connection, "corpora")}
            paths |= {f"runs/{row['run_id']}" for row in read_rows(connection, "runs")}
            rows = list(read_rows(connection, "pending_folders"))
        changes = {row["path"]: row["change"] for row in rows if row["change"] in _INTERRUPTED}
        return cls(frozenset(paths), changes)


def _why_replace(database: Path) -> str:
    if not database.exists():
        return "it is missing"
    if is_new(database):
        return "it is empty"
    damage = find_database_damage(database, full=True)
    return f"it is damaged ({damage}): the rows that can be read are kept" if damage else ""


def _manifest(bundle: Path) -> Manifest | None:
    try:
        return read_manifest(bundle)
    except ModelDamaged:
        return None


def _plan_bundle(plan: _Plan, path: Path, name: str, number: int) -> None:
    try:
        verify(path)
        plan.versions.append(describe_bundle(name, number, path, (path / MANIFEST_FILE).stat().st_mtime_ns))
    except ModelDamaged as error:
        plan.trash[path] = f"it is damaged: {error.message}"


def _plan_corpora(
    folder: DataFolder, plan: _Plan, contents: Contents, keys: _Keys, lineages: Mapping[str, ModelLineage]
) -> None:
    for path, corpus_id in contents.corpora.items():
        reference = folder.relative(path)
        if reference in keys.paths:
            continue
        if reference in keys.changes:
            plan.trash[path] = _INTERRUPTED[keys.changes[reference]]
            continue
        try:
            corpus, request_id = _describe_corpus(folder, path, corpus_id, lineages)
        except (OSError, ValueError) as error:
            plan.trash[path] = f"it cannot be described: {error}"
        else:
            plan.corpora.append((corpus, request_id))


def _describe_corpus(
    folder: DataFolder, path: Path, corpus_id: str, lineages: Mapping[str, ModelLineage]
) -> tuple[Corpus, str | None]:
    """Describe a corpus by its own description, or, where an earlier release has left none, by that of a model that was
    trained on it; raises OSError, ValueError."""
    if (path / DESCRIPTION_FILE).exists():
        corpus, request_id = read_description(path)
        if corpus.corpus_id != corpus_id:
            raise ValueError(f"{DESCRIPTION_FILE} is of {corpus.corpus_id}")
        if damage := find_damage(corpus, path):
            raise ValueError(damage)
        return corpus, request_id
    lineage = lineages.get(corpus_id)
    if lineage is None:
        raise ValueError(f"it has no {DESCRIPTION_FILE}, and no model was trained on it")
    if text_digest(path, lineage.source_language, lineage.target_language) != lineage.corpus_digest:
        raise ValueError("its text is not what the model of it was trained on")
    return _count_again(folder, path, corpus_id, lineage), None


def _count_again(folder: DataFolder, path: Path, corpus_id: str, lineage: ModelLineage) -> Corpus:
    held = HeldFolder(folder.incoming)
    try:
        splits = {split: check_split(split, path, held.path, CorpusLimits()).statistics for split in Split}
    finally:
        held.release()
    return Corpus(
        corpus_id=corpus_id,
        header=CorpusHeader(
            display_name=corpus_id,
            source_language=lineage.source_language,
            target_language=lineage.target_language,
        ),
        train=splits[Split.TRAIN],
        validation=splits[Split.VALIDATION],
        digest=lineage.corpus_digest,
        create_time_ns=path.stat().st_mtime_ns,
    )


def _run_of(version: ModelVersion, path: Path) -> TrainingRun:
    return TrainingRun(
        run_id=version.lineage.run_id,
        state=RunState.SUCCEEDED,
        corpus_id=version.lineage.corpus_id,
        model_name=version.name,
        recipe=version.lineage.recipe,
        create_time_ns=min(version.create_time_ns, path.stat().st_mtime_ns),
        attempt=1,
        last_sequence=1,
        model_version=version.version,
        end_time_ns=version.create_time_ns,
    )


def _insert(connection: Connection, plan: _Plan) -> None:
    for version in plan.versions:
        insert_rebuilt_version(connection, version)
    for corpus, request_id in plan.corpora:
        insert_corpus(connection, corpus, request_id)
    for run in sorted(plan.runs, key=lambda run: run.run_id):
        connection.execute(insert(tables.runs).values(run_to_values(run)))
        change = StateChange(
            state=run.state, attempt=1, message="the row was rebuilt by a repair; its records are lost"
        )
        add_records(connection, run.run_id, 0, [change])


def _rebuild(folder: DataFolder, plan: _Plan) -> None:
    """Make a database under another name, complete and durable."""
    making = folder.database.with_name(f"{folder.database.name}.making")
    for path in _with_logs(making):
        path.unlink(missing_ok=True)
    database = open_database(making)
    upgrade(database)
    database.dispose()
    if not is_new(folder.database):
        with (
            closing(open_existing(folder.database, _BUSY_TIMEOUT_S)) as old,
            closing(open_existing(making, _BUSY_TIMEOUT_S)) as new,
        ):
            new.execute("PRAGMA foreign_keys = ON")
            new.execute("BEGIN")
            for table in TABLES:
                insert_rows(new, table, read_rows(old, table))
            new.execute("COMMIT")
    with writing(database) as connection:
        _insert(connection, plan)
    database.dispose()
    _sync(making)
    making.rename(rebuilt_database(folder))
    sync_folder(folder.root)


def _put_in_place(folder: DataFolder) -> None:
    """Let the database that was made take the place of the present one, a copy of which is in the trash first."""
    old = [path for path in _with_logs(folder.database) if path.exists() and path.stat().st_size]
    if old:
        copies = folder.root / "ferryman.db.replaced"
        shutil.rmtree(copies, ignore_errors=True)
        copies.mkdir()
        for path in old:
            _link_or_copy(path, copies / path.name)
        move_to_trash(folder.trash, copies, "the database was made anew by a repair")
    for path in _with_logs(folder.database)[1:]:  # the log of another database would be played into the new one
        path.unlink(missing_ok=True)
    rebuilt_database(folder).replace(folder.database)
    sync_folder(folder.root)


def _link_or_copy(path: Path, copy: Path) -> None:
    try:
        os.link(path, copy)
    except OSError:  # not every file system has links
        shutil.copyfile(path, copy)


def _withdraw(folder: DataFolder, plan: _Plan) -> None:
    database = open_database(folder.database)
    try:
        with writing(database) as connection:
            for path in plan.trash:
                withdraw(connection, folder.relative(path))
    finally:
        database.dispose()


def _with_logs(database: Path) -> list[Path]:
    return [database, *(database.with_name(f"{database.name}{suffix}") for suffix in _LOGS)]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
