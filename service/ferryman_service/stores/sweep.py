"""What a start does about folders that the database does not know.

A crash in the middle of a publication or a deletion leaves a folder that was announced (pending.py): that change is
finished. Any other folder without a row is moved to the trash, never deleted. Many of them mean that the database is
not the one that belongs to the folders; then nothing is moved, and the service does not start.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sqlalchemy import Connection, Engine, select

from ferryman_service.domain.ids import CORPUS_PREFIX, RUN_PREFIX, is_id
from ferryman_service.domain.records import RunState
from ferryman_service.stores import tables
from ferryman_service.stores.database import writing
from ferryman_service.stores.folders import own_folders, remove_folder
from ferryman_service.stores.layout import DataFolder
from ferryman_service.stores.pending import FolderChange, announced, withdraw
from ferryman_service.stores.sqlite import open_existing
from ferryman_service.trash import TrashEntry, delete_entry, move_to_trash

_log = logging.getLogger(__name__)
_SHOWN: Final = 5
_BUSY_TIMEOUT_S: Final = 10.0
_UNFINISHED: Final = [state.value for state in RunState if not state.is_terminal]
NO_ROW: Final = "the database has no row for it"


class FolderInDoubt(OSError):
    """The database is not the one that belongs to the folders beside it: nothing is done until somebody decides."""


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What lies in the folder: paths of bundles, corpora and runs, by what they are."""

    bundles: Mapping[Path, tuple[str, int]]
    corpora: Mapping[Path, str]
    runs: Mapping[Path, str]

    def paths(self) -> list[Path]:
        """Return all paths, in the order of their names."""
        return sorted([*self.bundles, *self.corpora, *self.runs])

    def __str__(self) -> str:
        """Count them: "model versions: 2, corpora: 1, runs: 0"."""
        return f"model versions: {len(self.bundles)}, corpora: {len(self.corpora)}, runs: {len(self.runs)}"


def find_contents(folder: DataFolder) -> Contents:
    """Look what lies in the folder; raises OSError if one of its parts cannot be read."""
    return Contents(
        bundles={path: (name, number) for name, number, path in folder.bundles()},
        corpora={path: path.name for path in own_folders(folder.corpora, lambda name: is_id(name, CORPUS_PREFIX))},
        runs={path: path.name for path in own_folders(folder.runs, lambda name: is_id(name, RUN_PREFIX))},
    )


def is_new(path: Path) -> bool:
    """Tell whether a database is missing, empty or without tables; it is neither created nor changed."""
    try:
        if path.stat().st_size == 0:  # SQLite is not asked: it would delete the WAL of an empty file
            return True
    except FileNotFoundError:
        return True
    try:
        with closing(open_existing(path, _BUSY_TIMEOUT_S)) as database:
            query = "SELECT count(*) FROM sqlite_master WHERE type = 'table' AND name = 'alembic_version'"
            return bool(database.execute(query).fetchone() == (0,))
    except sqlite3.Error:
        return False  # it is damaged, locked or cannot be opened: whoever uses it next is told how


def refuse_new_database(folder: DataFolder) -> None:
    """Raise FolderInDoubt if the database is new and the folders beside it are not."""
    if rebuilt_database(folder).exists():
        raise FolderInDoubt(
            f"a repair of {folder.root.absolute()} was interrupted: run 'ferryman-service repair' again, to its end"
        )
    if not is_new(folder.database):
        return
    above = folder.root.absolute().parent / folder.database.name
    if above.exists():
        raise FolderInDoubt(
            f"{folder.root.absolute()} has no database, but the folder above it has one, {above}: if that is this "
            "service's, move all that lies beside it into the data folder, or give --data-dir the folder above"
        )
    contents = find_contents(folder)
    # Beside a file with content the log is of a process that makes the database now.
    if contents.paths() or (_is_nothing(folder.database) and _has_log(folder.database)):
        found = "is empty" if folder.database.exists() else "is missing"
        raise FolderInDoubt(
            f"the database {folder.database.absolute()} {found}, but the folders beside it are not ({contents}). "
            "Nothing was changed. Restore ferryman.db from a backup, or rebuild it from the folders with "
            "'ferryman-service repair', which says with --dry-run what it would do; or give --data-dir another folder"
        )


def rebuilt_database(folder: DataFolder) -> Path:
    """Return where a repair puts a database that is complete and will take the place of the present one."""
    return folder.database.with_name(f"{folder.database.name}.rebuilt")


def _is_nothing(path: Path) -> bool:
    return not path.exists() or path.stat().st_size == 0


def _has_log(database: Path) -> bool:
    """Tell whether beside the database is a write-ahead log with content, which SQLite deletes with an empty one."""
    try:
        return database.with_name(f"{database.name}-wal").stat().st_size > 0
    except FileNotFoundError:
        return False


def sweep(engine: Engine, folder: DataFolder) -> None:
    """Finish what a crash has interrupted, and move what has no row to the trash; call it when a service starts.

    Raises FolderInDoubt if that would be over a tenth of all bundles, corpora and runs; then nothing has changed.
    """
    contents = find_contents(folder)
    with writing(engine) as connection:  # under the writers' lock nobody is between a folder and its row
        changes = announced(connection)
        orphans = find_orphans(connection, folder, contents)
        unannounced = [path for path in orphans if folder.relative(path) not in changes]
        if 10 * len(unannounced) > len(contents.paths()):
            raise FolderInDoubt(_doubt(folder, unannounced, contents))
        for path in unannounced:
            with _left_on_failure(path):
                move_to_trash(folder.trash, path, NO_ROW)
        deleted = _finish(connection, folder, changes, orphans)
        _clear_staging(connection, folder)
    for entry in deleted:
        delete_entry(entry)


def finish_deletions(engine: Engine, folder: DataFolder) -> None:
    """Delete the folders whose deletion was interrupted or failed; call it now and then."""
    contents = find_contents(folder)  # before the transaction: nobody waits for it
    with writing(engine) as connection:
        changes = {
            path: change for path, change in announced(connection).items() if change is not FolderChange.PUBLISHING
        }
        orphans = find_orphans(connection, folder, contents) if changes else []
        deleted = _finish(connection, folder, changes, orphans)
    for entry in deleted:
        delete_entry(entry)


def find_orphans(connection: Connection, folder: DataFolder, contents: Contents) -> list[Path]:
    """Return the paths of the contents that have no row. A path that has gone in the meantime is left out."""
    versions = tables.model_versions.c
    rows = connection.execute(select(versions.name, versions.version))
    # In a damaged row the name may be anything.
    known = {folder.models / str(row.name) / str(row.version) for row in rows}
    known |= {folder.corpora / str(id_) for id_ in connection.execute(select(tables.corpora.c.corpus_id)).scalars()}
    known |= {folder.runs / str(id_) for id_ in connection.execute(select(tables.runs.c.run_id)).scalars()}
    return [path for path in contents.paths() if path not in known and path.exists()]


def _finish(
    connection: Connection, folder: DataFolder, changes: Mapping[str, FolderChange], orphans: list[Path]
) -> list[TrashEntry]:
    """Finish the announced changes, and return what the caller deletes once the transaction has ended."""
    deleted = []
    for path, change in changes.items():
        absolute = folder.root / path
        if absolute in orphans:
            deletes = change is FolderChange.DELETING
            reason = f"its {'publication' if change is FolderChange.PUBLISHING else 'deletion'} was interrupted"
            with _left_on_failure(absolute):
                entry = move_to_trash(folder.trash, absolute, reason)
                if entry is not None and deletes:
                    deleted.append(entry)
        is_published = change is FolderChange.PUBLISHING and absolute not in orphans
        if is_published or not os.path.lexists(absolute):
            withdraw(connection, path)
    return deleted


def _clear_staging(connection: Connection, folder: DataFolder) -> None:
    """Remove what ended runs have staged, and move away what runs without a row have."""
    runs = tables.runs.c
    states = {row.run_id: row.state for row in connection.execute(select(runs.run_id, runs.state))}
    for path in own_folders(folder.staging, lambda name: is_id(name, RUN_PREFIX)):
        with _left_on_failure(path):
            if path.name not in states:
                move_to_trash(folder.trash, path, NO_ROW)
            elif states[path.name] not in _UNFINISHED:
                remove_folder(path)


@contextlib.contextmanager
def _left_on_failure(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        _log.warning("%s could not be moved away, it is left alone: %s", path, error)


def _doubt(folder: DataFolder, orphans: list[Path], contents: Contents) -> str:
    shown = ", ".join(folder.relative(path) for path in orphans[:_SHOWN])
    more = f" and {len(orphans) - _SHOWN} more" if len(orphans) > _SHOWN else ""
    return (
        f"the database {folder.database.absolute()} has no rows for {len(orphans)} of {len(contents.paths())} folders "
        f"beside it: {shown}{more}. It may be older than they are. Nothing was changed. Restore the ferryman.db that "
        "belongs to them, or let 'ferryman-service repair' rebuild the rows, which says with --dry-run what it would do"
    )
