"""Everything that is particular to SQLite: how it is opened, how its transactions begin, what its errors mean."""

from __future__ import annotations

import functools
import itertools
import os
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from sqlalchemy import URL, Connection, Engine, ExceptionContext, create_engine, event

from ferryman_service.domain.errors import DatabaseDamaged, DiskFull, FerrymanError, StoreUnavailable
from ferryman_service.domain.os_errors import NO_SPACE

WRITES_OPTION: Final = "ferryman_writes"
"""Execution option of a connection whose next transaction will write."""
_TURN_OPTION: Final = "ferryman_writer_turn"
"""Execution option of an engine: the lock that a thread holds while it writes, and how long it waits for it, s."""

_RETRY_S: Final = 0.02
_PROBE_BYTES: Final = 64 * 1024
_DISK_FULL: Final = "the disk that holds the database has no space left: free some and try again"
_DAMAGED_CODES: Final = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
CURE: Final = (
    "stop all processes that use the data folder, then restore ferryman.db from a backup, or rebuild it from the "
    "folders with 'ferryman-service repair', which says with --dry-run what it would do"
)
"""What to do about a damaged database."""
_WORLD_CODES: Final = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_PROTOCOL,
    }
)


def has_room(folder: Path) -> bool:
    """Find out by trying: no statistics know of a quota."""
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(_PROBE_BYTES))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        return error.errno not in NO_SPACE
    return True


def create_sqlite_engine(path: Path, busy_timeout_s: float, has_room: Callable[[Path], bool] = has_room) -> Engine:
    """Return an engine for the file, which must exist when the first connection is opened: one that has gone is not
    replaced by an empty one.

    A writing transaction begins with BEGIN IMMEDIATE: it waits for the one writer's place before it reads, so two
    processes can neither deadlock nor base a write on what has changed since
    (https://www.sqlite.org/lang_transaction.html).
    """

    def connect() -> sqlite3.Connection:
        return open_existing(path, busy_timeout_s, check_same_thread=False)

    # No thread waits for a connection: the threads bound their number, and writers take one at a time (writer_turn).
    engine = create_engine(URL.create("sqlite", database=str(path)), creator=connect, max_overflow=-1)
    engine.update_execution_options(**{_TURN_OPTION: (threading.Lock(), busy_timeout_s)})

    def configure(dbapi_connection: sqlite3.Connection, _record: object) -> None:
        dbapi_connection.isolation_level = None  # the driver begins no transaction of its own
        # Text that is not UTF-8 arrives with surrogates, which `readable` refuses: an error here would refuse every
        # other row of the query.
        dbapi_connection.text_factory = functools.partial(str, encoding="utf-8", errors="surrogateescape")
        _enter_wal_mode(dbapi_connection, busy_timeout_s)
        # FULL: in WAL mode a commit is on the disk when it returns, also after a loss of power.
        dbapi_connection.execute("PRAGMA synchronous = FULL")
        dbapi_connection.execute("PRAGMA foreign_keys = ON")

    def tell_full_disk(context: ExceptionContext) -> None:
        # A file system may find out at fsync that there is no room, which SQLite calls an I/O error like any other.
        error = context.original_exception
        failed = isinstance(error, sqlite3.Error) and _primary_code(error) == sqlite3.SQLITE_IOERR
        if failed and not has_room(path.parent):
            raise DiskFull(_DISK_FULL) from error

    event.listen(engine, "connect", configure)
    event.listen(engine, "begin", _begin)
    event.listen(engine, "handle_error", tell_full_disk)
    return engine


def open_existing(path: Path, busy_timeout_s: float, *, check_same_thread: bool = True) -> sqlite3.Connection:
    """Connect to a database file that must exist; raises sqlite3.OperationalError if it does not."""
    uri = f"{path.absolute().as_uri()}?mode=rw"
    return sqlite3.connect(
        uri, uri=True, timeout=busy_timeout_s, isolation_level=None, check_same_thread=check_same_thread
    )


@contextmanager
def writer_turn(engine: Engine) -> Iterator[None]:
    """Be this process's only writer for the length of the block; raises StoreUnavailable after the engine's timeout.

    To be taken before a connection: however many writers wait, they leave the connections to the readers, whom a
    database in WAL mode never keeps waiting (https://www.sqlite.org/wal.html#concurrency).
    """
    lock, timeout_s = engine.get_execution_options()[_TURN_OPTION]
    if not lock.acquire(timeout=timeout_s):
        raise StoreUnavailable("the database cannot be used now (other transactions write to it): try again")
    try:
        yield
    finally:
        lock.release()


class ChangeCounter:
    """Tells whether a database has changed, in a few µs and without waiting. Safe to use from every thread."""

    def __init__(self, engine: Engine) -> None:
        """Store; the connection, which it needs for itself, is opened at first use and closed with the engine."""
        self._engine = engine
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._openings = 0
        self._unknown = itertools.count(-1, -1)
        event.listen(engine, "engine_disposed", lambda _: self._close())

    def value(self) -> int:
        """Return a number that is another one after every commit of any other connection, of whatever process.

        SQLite promises so of one connection's data_version (https://www.sqlite.org/pragma.html#pragma_data_version).
        While it cannot be read, every call returns a new number.
        """
        try:
            with self._lock:
                if self._connection is None:
                    path = Path(str(self._engine.url.database))
                    self._connection = open_existing(path, 0, check_same_thread=False)
                    self._openings += 1
                [value] = self._connection.execute("PRAGMA data_version").fetchone()
                # The versions that one connection has seen mean nothing to the next.
                return self._openings << 32 | int(value)
        except sqlite3.DatabaseError:
            return next(self._unknown)

    def _close(self) -> None:
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None


def translate_sqlite_error(error: sqlite3.Error) -> FerrymanError | None:
    """Return the domain error for what the world did to the database; None for a mistake of ours."""
    primary_code = _primary_code(error)
    if primary_code in _DAMAGED_CODES:
        return DatabaseDamaged(f"the database, ferryman.db in the data folder, is damaged ({error}): {CURE}")
    if primary_code == sqlite3.SQLITE_FULL:
        return DiskFull(_DISK_FULL)
    if primary_code in _WORLD_CODES:
        return StoreUnavailable(f"the database cannot be used now ({error}): try again")
    return None


def _primary_code(error: sqlite3.Error) -> int:
    code: int = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
    return code & 0xFF


def _begin(connection: Connection) -> None:
    options: dict[str, Any] = dict(connection.get_execution_options())
    connection.exec_driver_sql("BEGIN IMMEDIATE" if options.get(WRITES_OPTION) else "BEGIN")


def _enter_wal_mode(connection: sqlite3.Connection, timeout_s: float) -> None:
    # The mode stays with the file, so only the very first opening changes it, and that change does not wait for other
    # connections by itself: SQLite answers SQLITE_BUSY at once where waiting could deadlock.
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() >= deadline_s:
                raise
            time.sleep(_RETRY_S)
