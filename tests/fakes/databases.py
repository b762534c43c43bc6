"""Databases with up-to-date tables: migrated once, then copied. Only tests of the migrations need to run them again."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

from sqlalchemy import Engine

from ferryman_service.stores.database import open_database, reading, upgrade


@functools.cache
def _migrated() -> bytes:
    """Return the file of an empty database; closing its last connection has written the WAL back into it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ferryman.db"
        database = open_database(path)
        upgrade(database)
        database.dispose()
        assert list(path.parent.iterdir()) == [path]
        return path.read_bytes()


def open_migrated(path: Path, *args, **options) -> Engine:
    """Return what `open_database` and `upgrade` leave at a path where there is no file yet: the connection that
    migrated is open, and so the files of its WAL exist."""
    with path.open("xb") as file:
        file.write(_migrated())
    database = open_database(path, *args, **options)
    with reading(database) as connection:
        connection.exec_driver_sql("SELECT 1 FROM runs")
    return database
