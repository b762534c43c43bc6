"""Opening the database, its transactions, and bringing its tables up to date."""

from __future__ import annotations

import errno
import logging
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import sqlalchemy.exc
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine

from ferryman_service.domain.errors import DiskFull, StoreUnavailable
from ferryman_service.stores.readable import UNREADABLE_OPTION, UnreadableRows
from ferryman_service.stores.sqlite import WRITES_OPTION, create_sqlite_engine, translate_sqlite_error

_log = logging.getLogger(__name__)
_MIGRATIONS: Final = Path(__file__).parent / "migrations"
_NO_SPACE: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
_ON_FAILURE_OPTION: Final = "ferryman_on_failure"
"""Execution option of an engine: what is called when one of its transactions fails."""


class DatabaseTooNew(Exception):
    """The database was written by a newer version of this program."""


def open_database(
    path: Path,
    busy_timeout_s: float = 10.0,
    on_failure: Callable[[], None] | None = None,
    on_unreadable: Callable[[str], None] | None = None,
) -> Engine:
    """Return an engine for the database file, safe to use from every thread. Its tables need `upgrade` first.

    A transaction waits `busy_timeout_s` for another process before it raises StoreUnavailable. `on_failure` is called
    when one ends with StoreUnavailable or DiskFull; `on_unreadable` is told the table of each row that is found to be
    unreadable, once for each.
    """
    engine = create_sqlite_engine(path, busy_timeout_s)
    engine.update_execution_options(
        **{_ON_FAILURE_OPTION: on_failure, UNREADABLE_OPTION: UnreadableRows(on_unreadable)}
    )
    return engine


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """Run a transaction that only reads, on one snapshot. Raises StoreUnavailable."""
    with _told_failures(engine), _translated_errors(), engine.begin() as connection:
        yield connection


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """Run a transaction that writes; such transactions follow one another, across processes.

    Raises StoreUnavailable, DiskFull.
    """
    writes = engine.execution_options(**{WRITES_OPTION: True})
    with _told_failures(engine), _translated_errors(), writes.begin() as connection:
        yield connection


@contextmanager
def disk_errors() -> Iterator[None]:
    """Turn "no space left" of a file operation into DiskFull."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise DiskFull("the disk of the data folder has no space left: free some and try again") from error
        raise


def upgrade(engine: Engine) -> None:
    """Create or migrate the tables, in one transaction; safe when several processes start at once.

    Raises DatabaseTooNew, StoreUnavailable, DiskFull.
    """
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    with writing(engine) as connection:
        present = MigrationContext.configure(connection).get_current_heads()
        known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
        if unknown := sorted(set(present) - known):
            raise DatabaseTooNew(
                f"{engine.url.database} has schema {', '.join(unknown)}, which this version does not know: it was "
                "written by a newer version. Run that version, or start with another data folder."
            )
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
        reached = MigrationContext.configure(connection).get_current_heads()
    if reached != present:
        before = f"schema {', '.join(present)}" if present else "nothing"
        _log.info("the database was brought from %s to schema %s", before, ", ".join(reached))


@contextmanager
def _told_failures(engine: Engine) -> Iterator[None]:
    try:
        yield
    except (StoreUnavailable, DiskFull):
        on_failure = engine.get_execution_options().get(_ON_FAILURE_OPTION)
        if on_failure is not None:
            on_failure()
        raise


@contextmanager
def _translated_errors() -> Iterator[None]:
    try:
        yield
    except sqlalchemy.exc.TimeoutError as error:
        raise StoreUnavailable("too many database transactions at once: try again") from error
    except sqlalchemy.exc.DatabaseError as error:
        translated = translate_sqlite_error(error.orig) if isinstance(error.orig, sqlite3.Error) else None
        if translated is None:
            raise
        raise translated from error
