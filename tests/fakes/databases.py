"""Databases with up-to-date tables: migrated once, then copied. Only tests of the migrations need to run them again."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

from sqlalchemy import Engine, delete, insert

from ferryman_service.stores import tables
from ferryman_service.stores.database import open_database, reading, upgrade, writing


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


def drop_corpus(database: Engine, corpus_id: str = "cor_x") -> None:
    """Remove the row that `add_corpus` added, once the runs that need it are there."""
    with writing(database) as connection:
        connection.execute(delete(tables.corpora).where(tables.corpora.c.corpus_id == corpus_id))


def add_corpus(database: Engine, corpus_id: str = "cor_x") -> None:
    """Add the row of a corpus, for runs that need one, unless it is there."""
    statistics = {"pairs": 1, "source_words": 1, "target_words": 1, "empty_pairs": 0, "samples": [], "warnings": []}
    values = {
        "corpus_id": corpus_id,
        "display_name": "",
        "source_language": "en",
        "target_language": "de",
        "train": statistics,
        "validation": statistics,
        "digest": "ab" * 32,
        "create_time_ns": 1,
    }
    with writing(database) as connection:
        connection.execute(insert(tables.corpora).prefix_with("OR IGNORE").values(values))
