"""Announcing that a folder will be published or deleted.

A row and a folder cannot change in one step. Before a folder moves into place its path is announced, in a transaction
of its own, and the transaction that inserts the folder's row withdraws the announcement. A deletion, or a move to the
trash, is announced by the transaction that deletes the row. So a folder without a row that is announced is what a crash
has left; one that is not announced has lost its row in some other way, and may be data.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Mapping
from typing import Final

from sqlalchemy import Connection, delete, insert, select

from ferryman_service.stores import tables

_PENDING: Final = tables.pending_folders


class FolderChange(enum.StrEnum):
    """What is about to happen to a folder."""

    PUBLISHING = "publishing"
    DELETING = "deleting"
    TO_TRASH = "to_trash"


def announce(connection: Connection, path: str, change: FolderChange) -> None:
    """Announce the change of the folder at `path`, which is relative to the data folder."""
    withdraw(connection, path)
    connection.execute(insert(_PENDING).values(path=path, change=change.value, time_ns=time.time_ns()))


def withdraw(connection: Connection, path: str) -> None:
    """Take back what was announced for the path, if anything was."""
    connection.execute(delete(_PENDING).where(_PENDING.c.path == path))


def announced(connection: Connection) -> Mapping[str, FolderChange]:
    """Return all changes that are announced, by path."""
    known = _PENDING.c.change.in_([change.value for change in FolderChange])
    rows = connection.execute(select(_PENDING.c.path, _PENDING.c.change).where(known))
    return {row.path: FolderChange(row.change) for row in rows}
