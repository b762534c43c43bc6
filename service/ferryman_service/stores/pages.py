"""Pages of tables that are listed by time: a place in such a list is "<create_time_ns>/<id>", and outlives its row.

Rows whose time is no number, or whose id is no text, have no such place. They come last, in the order in which they
were inserted. SQLite keeps whatever it is handed, and orders numbers before texts and texts before bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from sqlalchemy import Connection, LargeBinary, Row, Table, Text, cast, literal, literal_column, or_, select, tuple_
from sqlalchemy.sql import ColumnElement

_FIRST_TEXT: Final = literal("", Text())
_FIRST_BYTES: Final = literal(b"", LargeBinary())
_MARK: Final = "?"


def page_by_time(
    connection: Connection,
    table: Table,
    wanted: Sequence[ColumnElement[bool]],
    after: str | None,
    limit: int,
    *,
    oldest_first: bool = False,
) -> list[tuple[Row[Any], str]]:
    """Return the wanted rows of a table with `create_time_ns` that follow the place `after` (None: from the start), at
    most `limit`, each with its place."""
    [row_id] = table.primary_key.columns
    time_ns = table.c.create_time_ns
    number: ColumnElement[int] = literal_column(f"{table.name}.rowid")
    query = select(table, number.label("row_number")).where(*wanted)
    found: list[tuple[Row[Any], str]] = []
    if after is None or not after.startswith(_MARK):
        ordered = query.where(time_ns < _FIRST_TEXT, row_id < _FIRST_BYTES)
        if after is not None:
            place, last = tuple_(time_ns, row_id), _parse(after)
            ordered = ordered.where(place > last if oldest_first else place < last)
        order = (column.asc() if oldest_first else column.desc() for column in (time_ns, row_id))
        rows = connection.execute(ordered.order_by(*order).limit(limit))
        found += [(row, f"{row.create_time_ns}/{getattr(row, row_id.name)}") for row in rows]
        after = None
    if len(found) < limit:
        odd = or_(time_ns.is_(None), time_ns >= _FIRST_TEXT, row_id.is_(None), row_id >= _FIRST_BYTES)
        seen = 0 if after is None else int(after.removeprefix(_MARK))
        rows = connection.execute(query.where(odd, number > seen).order_by(number).limit(limit - len(found)))
        found += [(row, f"{_MARK}{row.row_number}") for row in rows]
    return found


def _parse(place: str) -> ColumnElement[Any]:
    time_text, _, last_id = place.partition("/")
    time_ns = int(time_text) if time_text.lstrip("-").isdigit() else float(time_text)
    # An id that is not UTF-8 cannot be handed over as text.
    of_bytes = literal(last_id.encode(errors="surrogateescape"), LargeBinary())
    return tuple_(literal(time_ns), cast(of_bytes, Text()))
