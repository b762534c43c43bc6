"""Reading what can still be read of a damaged database."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Generator, Iterator, Mapping
from typing import Any, Final

from ferryman_service.stores import tables

_log = logging.getLogger(__name__)
TABLES: Final = tuple(table.name for table in tables.metadata.sorted_tables)
"""In an order in which no row refers to one of a later table."""


def read_rows(database: sqlite3.Connection, table: str) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a table that can be read whole, each at least once; of the columns those that are known.

    A damaged page ends the reading there, so the table is read from its end, too.
    """
    database.text_factory = bytes
    try:
        present = {row[1].decode() for row in database.execute(f"PRAGMA table_info({table})")}
    except (sqlite3.Error, UnicodeDecodeError):
        return
    wanted = [column.name for column in tables.metadata.tables[table].columns if column.name in present]
    if not wanted:
        return
    query = f"SELECT {', '.join(wanted)} FROM {table} NOT INDEXED ORDER BY rowid"  # noqa: S608
    if (yield from _read(database, query, wanted)):
        _log.warning("the table %s cannot be read in one piece: some of its rows may be lost", table)
        yield from _read(database, f"{query} DESC", wanted)


def insert_rows(database: sqlite3.Connection, table: str, rows: Iterator[Mapping[str, Any]]) -> int:
    """Insert rows as they were read, and return how many; those that are there, or fit no table, are left out."""
    count = 0
    for row in rows:
        places = ", ".join("?" * len(row))
        statement = f"INSERT OR IGNORE INTO {table} ({', '.join(row)}) VALUES ({places})"  # noqa: S608
        try:
            count += database.execute(statement, tuple(row.values())).rowcount
        except sqlite3.IntegrityError:
            continue  # it refers to a row that is lost
    return count


def _read(database: sqlite3.Connection, query: str, names: list[str]) -> Generator[Mapping[str, Any], None, bool]:
    """Yield rows; return whether an error has ended that."""
    try:
        for row in database.execute(query):
            try:
                yield dict(zip(names, map(_decoded, row), strict=True))
            except UnicodeDecodeError:
                continue
    except sqlite3.Error:
        return True
    return False


def _decoded(value: object) -> object:
    return value.decode() if isinstance(value, bytes) else value
