"""Whether the database is what was written: SQLite's own checks, and what the last one found.

The quick check reads every page; the full one compares every index with its table as well. Neither sees a changed byte
inside a value: what is wrong there is found when the value is read, or by `verify`.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Final

from ferryman_service.domain.errors import DatabaseDamaged
from ferryman_service.stores.sqlite import CURE, open_existing, translate_sqlite_error

_log = logging.getLogger(__name__)
_BUSY_TIMEOUT_S: Final = 10.0
_MAX_FINDINGS: Final = 3
_MAX_CHARACTERS: Final = 300
_NICE: Final = 19
_LOOK_EVERY: Final = 100_000
"""Steps of SQLite between two looks whether the check is still wanted."""


def find_damage(path: Path, *, full: bool, is_unwanted: Callable[[], bool] = lambda: False) -> str:
    """Check the database and return what is wrong with it, "" if nothing is; 2 s a GiB, twice that if `full`.

    Once `is_unwanted` it ends early, as if it had found nothing. Raises StoreUnavailable.
    """
    check = "integrity_check" if full else "quick_check"
    try:
        with closing(open_existing(path, _BUSY_TIMEOUT_S)) as connection:
            connection.set_progress_handler(is_unwanted, _LOOK_EVERY)
            rows = connection.execute(f"PRAGMA {check}({_MAX_FINDINGS})").fetchall()
            if full and rows == [("ok",)]:
                rows = [(f"row {row[1]} of {row[0]} refers to no row of {row[2]}",) for row in _dangling(connection)]
    except sqlite3.Error as error:
        if is_unwanted():
            return ""
        translated = translate_sqlite_error(error)
        if translated is None:
            raise
        if not isinstance(translated, DatabaseDamaged):
            raise translated from error
        return str(error)
    findings = [" ".join(str(row[0]).split()) for row in rows if row != ("ok",)]
    return "; ".join(findings)[:_MAX_CHARACTERS]


def refuse_damaged(path: Path) -> None:
    """Check the database quickly; raises DatabaseDamaged, StoreUnavailable."""
    if damage := find_damage(path, full=False):
        raise DatabaseDamaged(damage_message(path, damage))


def damage_message(path: Path, damage: str) -> str:
    """Return the message about a damaged database, with the cure."""
    return f"the database {path.absolute()} is damaged ({damage}): {CURE}"


class DatabaseIntegrity:
    """What is known of the database's damage. Safe to use from every thread."""

    def __init__(self, path: Path) -> None:
        """Store the path; nothing is known to be wrong."""
        self._path = path
        self._lock = threading.Lock()
        self._damage = ""
        self._stopped = threading.Event()

    def damage(self) -> str:
        """Return what is wrong with the database as far as is known, "" if nothing is."""
        with self._lock:
            return self._damage

    def met(self, damage: str) -> None:
        """Take note of damage that a transaction has met."""
        with self._lock:
            is_news, self._damage = not self._damage, self._damage or damage
        if is_news:
            _log.error(damage)

    def forget(self) -> None:
        """Take note that another database is in the place of the one that was known."""
        with self._lock:
            self._damage = ""

    def check(self) -> None:
        """Check everything, in a connection of its own and at the lowest priority; the calling thread keeps it.

        Readers and writers go on meanwhile; only the WAL is not shortened. Raises StoreUnavailable.
        """
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        damage = find_damage(self._path, full=True, is_unwanted=self._stopped.is_set)
        if self._stopped.is_set():
            return
        self.forget()
        if damage:
            self.met(damage_message(self._path, damage))

    def stop(self) -> None:
        """End a check early, and let there be no other."""
        self._stopped.set()


def _dangling(connection: sqlite3.Connection) -> list[tuple[str, int, str, int]]:
    return connection.execute("PRAGMA foreign_key_check").fetchmany(_MAX_FINDINGS)
