"""Reading rows that may hold anything: rot, a hand that edited the file, or a newer release before this one.

A row that cannot be read is one such row: it is noted, once, and stands in lists as an UnreadableRow; no other row
suffers from it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any, Final, TypeVar

from sqlalchemy import Boolean, Connection, Integer, Row, Table, Text

from ferryman_service.domain.errors import RowUnreadable
from ferryman_service.domain.stored import UnreadableRow, check_fields
from ferryman_service.stores.tables import BadJson, JsonText

_log = logging.getLogger(__name__)
_MAX_NOTED: Final = 10_000
UNREADABLE_OPTION: Final = "ferryman_unreadable"
"""Execution option of an engine: its UnreadableRows."""

UNPARSABLE: Final = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    RecursionError,
)
"""What parsing a value raises that is not what it should be."""

T = TypeVar("T")


class UnreadableRows:
    """Notes the rows that cannot be read: a line in the log and a call of `on_found`, once for each row and reason, of
    a run's records once for the run. Safe to use from every thread."""

    def __init__(self, on_found: Callable[[str], None] | None = None) -> None:
        """Store; `on_found` is told the table."""
        self._on_found = on_found
        self._noted: set[tuple[str, ...]] = set()
        self._lock = threading.Lock()

    def note(self, row: UnreadableRow) -> None:
        """Tell of a row, unless it was told before."""
        of_run = row.table == "records"
        key = (row.table, row.name.partition("/")[0]) if of_run else (row.table, row.name, row.why)
        with self._lock:
            if key in self._noted or len(self._noted) >= _MAX_NOTED:
                return
            self._noted.add(key)
        _log.error("the database has a row in %s that cannot be read, %s: %s", row.table, row.name, row.why)
        if self._on_found is not None:
            self._on_found(row.table)


def read_row(
    connection: Connection, table: Table, row: Row[Any], parse: Callable[[Row[Any]], T], name: str, place: str = ""
) -> T | UnreadableRow:
    """Return what `parse` makes of a whole row of the table; if it cannot be read, note it and say so.

    `name` and `place` are the UnreadableRow's.
    """
    try:
        return parse_row(table, row, parse)
    except UNPARSABLE as error:
        return note_unreadable(connection, UnreadableRow(table=table.name, name=name, place=place, why=_why(error)))


def parse_row(table: Table, row: Row[Any], parse: Callable[[Row[Any]], T]) -> T:
    """Return what `parse` makes of a whole row of the table; raises one of `UNPARSABLE` if it cannot be read."""
    check_columns(table, row)
    value = parse(row)
    check_fields(value)
    return value


def note_unreadable(connection: Connection, row: UnreadableRow) -> UnreadableRow:
    """Note a row that cannot be read, and return it."""
    noted: UnreadableRows | None = connection.get_execution_options().get(UNREADABLE_OPTION)
    if noted is not None:
        noted.note(row)
    return row


def require(row: T | UnreadableRow) -> T:
    """Return the row; raises RowUnreadable if it cannot be read."""
    if isinstance(row, UnreadableRow):
        raise RowUnreadable(
            f"{row.name} cannot be read: in the database its {row.why}. Delete it, or restore a backup of the data "
            "folder; if a newer version has written it, run that version",
            name=row.name,
            table=row.table,
        )
    return row


def shown(value: object) -> str:
    """Return a column's value as text that every answer can hold."""
    return str(value).encode(errors="replace").decode()


def check_columns(table: Table, row: Row[Any]) -> None:
    """Raise ValueError if a column of the row is missing, or of a type that its table does not give it: SQLite keeps
    whatever it is handed."""
    for column in table.columns:
        value = getattr(row, column.name)
        if value is None:
            if not column.nullable:
                raise ValueError(f"{column.name} is missing")
        elif isinstance(value, BadJson):
            raise ValueError(f"{column.name} is no JSON: {value.why}")
        elif isinstance(column.type, Integer) and type(value) is not int:
            raise ValueError(f"{column.name} is {value!r:.80}, which is no whole number")
        elif isinstance(column.type, Text):
            _check_text(column.name, value)
        else:
            assert isinstance(column.type, Boolean | Integer | JsonText), f"a column of type {column.type}"


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{name} is {value!r:.80}, which is no text")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{name} is not UTF-8") from error


def _why(error: BaseException) -> str:
    text = f"part {error.args[0]!r} is missing" if isinstance(error, KeyError) and error.args else str(error)
    return shown(text)[:300] or type(error).__name__
