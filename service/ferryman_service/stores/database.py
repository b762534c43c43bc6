"""Opening the database, its transactions, and bringing its tables up to date."""

from __future__ import annotations

import contextlib
import logging
import os
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

from ferryman_service.domain.errors import DatabaseDamaged, DiskFull, StoreUnavailable
from ferryman_service.domain.os_errors import domain_error
from ferryman_service.stores.readable import UNREADABLE_OPTION, UnreadableRows
from ferryman_service.stores.sqlite import WRITES_OPTION, create_sqlite_engine, translate_sqlite_error, writer_turn

_log = logging.getLogger(__name__)
_MIGRATIONS: Final = Path(__file__).parent / "migrations"
_ON_FAILURE_OPTION: Final = "ferryman_on_failure"
"""Execution option of an engine: what is called when one of its transactions fails."""
_ON_DAMAGE_OPTION: Final = "ferryman_on_damage"
"""Execution option of an engine: what is called with the message when one of its transactions meets damage."""


class DatabaseTooNew(Exception):
    """The database was written by a newer version of this program."""


def open_database(
    path: Path,
    busy_timeout_s: float = 10.0,
    on_failure: Callable[[], None] | None = None,
    on_damage: Callable[[str], None] | None = None,
    on_unreadable: Callable[[str], None] | None = None,
) -> Engine:
    """Return an engine for the database file, safe to use from every thread. File and tables need `upgrade` first.

    A transaction waits `busy_timeout_s` for another process before it raises StoreUnavailable. `on_failure` is called
    when one ends with StoreUnavailable, DiskFull or DatabaseDamaged, and `on_damage` with the message of the last;
    `on_unreadable` is told the table of each row that is found to be unreadable, once for each.
    """
    engine = create_sqlite_engine(path, busy_timeout_s)
    engine.update_execution_options(
        **{
            _ON_FAILURE_OPTION: on_failure,
            _ON_DAMAGE_OPTION: on_damage,
            UNREADABLE_OPTION: UnreadableRows(on_unreadable),
        }
    )
    return engine


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """Run a transaction that only reads, on one snapshot. Raises StoreUnavailable, DatabaseDamaged."""
    with _told_failures(engine), _translated_errors(), engine.begin() as connection:
        yield connection


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """Run a transaction that writes; such transactions follow one another, across processes.

    Raises StoreUnavailable, DiskFull, DatabaseDamaged.
    """
    writes = engine.execution_options(**{WRITES_OPTION: True})
    with _told_failures(engine), _translated_errors(), writer_turn(engine), writes.begin() as connection:
        yield connection


@contextmanager
def disk_errors() -> Iterator[None]:
    """Raise the domain error for what the machine did to a file operation, such as DiskFull."""
    try:
        yield
    except OSError as error:
        translated = domain_error(error)
        if translated is None:
            raise
        raise translated from error


def upgrade(engine: Engine) -> None:
    """Create or migrate the tables, in one transaction; safe when several processes start at once.

    Raises DatabaseTooNew, StoreUnavailable, DiskFull, DatabaseDamaged; OSError if the file cannot be created.
    """
    with contextlib.suppress(FileExistsError), disk_errors():
        os.close(os.open(str(engine.url.database), os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644))
    config = _config()
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


def is_current(engine: Engine) -> bool:
    """Tell whether the tables are those of this release."""
    with reading(engine) as connection:
        present = MigrationContext.configure(connection).get_current_heads()
    return present == tuple(ScriptDirectory.from_config(_config()).get_heads())


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    return config


@contextmanager
def _told_failures(engine: Engine) -> Iterator[None]:
    try:
        yield
    except (StoreUnavailable, DiskFull, DatabaseDamaged) as error:
        on_damage = engine.get_execution_options().get(_ON_DAMAGE_OPTION)
        if on_damage is not None and isinstance(error, DatabaseDamaged):
            on_damage(error.message)
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
