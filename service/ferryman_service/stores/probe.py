"""Looks whether the data folder can be used, as a new connection finds it."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Final, TypeAlias

from sqlalchemy import Engine

from ferryman_service.domain.readiness import StoreState
from ferryman_service.stores.integrity import DatabaseIntegrity

_log = logging.getLogger(__name__)
_READ: Final = "SELECT 1 FROM model_versions LIMIT 1"
_CHANGE_NOTHING: Final = "DELETE FROM model_versions WHERE 0"
_Identity: TypeAlias = "tuple[int, int] | None"


class DatabaseProbe:
    """The StoreProbe: opens the database anew, reads from it, and takes the writers' place for a moment.

    Connections that are open already know nothing of a folder that was moved away or mounted anew. So when the database
    is back after it was lost, or is another file, all of them are closed, and the next transactions open new ones.
    """

    def __init__(
        self, engine: Engine, *, writes: bool, busy_timeout_s: float = 10.0, integrity: DatabaseIntegrity | None = None
    ) -> None:
        """Store; a process that does not write does not ask for the writers' place. `integrity` knows of damage, and is
        told when another database is there."""
        self._engine = engine
        self._path = Path(str(engine.url.database)).absolute()
        self._writes = writes
        self._busy_timeout_s = busy_timeout_s
        self._integrity = integrity or DatabaseIntegrity(self._path)
        self._identity = self._identify()
        self._last = StoreState.USABLE

    def look(self) -> StoreState:
        """Return what can be done with the database now; called by one thread at a time."""
        state, why = self._look()
        if state is not self._last:
            _log.log(logging.INFO if state is StoreState.USABLE else logging.ERROR, "%s: %s", self._path, why)
        identity = self._identify()
        if state is not StoreState.LOST and (self._last is StoreState.LOST or identity != self._identity):
            self._identity = identity
            self._engine.dispose()
            self._integrity.forget()
        self._last = state
        return state

    def _look(self) -> tuple[StoreState, str]:
        state = StoreState.LOST
        try:
            self._open_folder()
            with self._connection() as connection:
                connection.execute(_READ).fetchall()
                state = StoreState.READ_ONLY
                if self._writes:
                    connection.execute("BEGIN IMMEDIATE")
                    # What can only be read begins such a transaction too, but refuses every statement that writes.
                    connection.execute(_CHANGE_NOTHING)
                    connection.execute("ROLLBACK")
        except (sqlite3.Error, OSError) as error:
            return state, f"the database {'can only be read' if state else 'cannot be used'} ({error})"
        if damage := self._integrity.damage():
            return StoreState.DAMAGED, damage
        return StoreState.USABLE, "the database can be used"

    def _open_folder(self) -> None:
        """Raise OSError where no file can be opened: SQLite keeps descriptors that it closed, and does without."""
        # Not the database file: closing any descriptor of it would drop the locks that SQLite holds on it (fcntl(2)).
        os.close(os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY))

    @contextlib.contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        uri = f"{self._path.as_uri()}?mode=rw"  # rw: a database that is gone is not made anew
        with closing(sqlite3.connect(uri, uri=True, timeout=self._busy_timeout_s, isolation_level=None)) as connection:
            yield connection

    def _identify(self) -> _Identity:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino
