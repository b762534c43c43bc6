"""The tables. Times are nanoseconds since 1970, UTC.

A change here needs a script in migrations/versions; a test compares the two.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Dialect,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    TypeDecorator,
    false,
)


@dataclass(frozen=True)
class BadJson:
    """In place of the value of a column whose text is no JSON: a row that holds one cannot be read."""

    why: str


class JsonText(TypeDecorator[Any]):
    """JSON kept as text, in Python's form: NaN and the infinities survive, which no database's own type allows."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:  # noqa: ANN401
        """Return the text to store."""
        return None if value is None else json.dumps(value, ensure_ascii=False, separators=(",", ":"))

    def process_result_value(self, value: str | None, dialect: Dialect) -> Any:  # noqa: ANN401
        """Return what was stored, BadJson if that is no JSON: an error here would take the other rows with it."""
        try:
            return None if value is None else json.loads(value)
        except (ValueError, TypeError, RecursionError) as error:
            return BadJson(str(error))


metadata: Final = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

runs: Final = Table(
    "runs",
    metadata,
    Column("run_id", Text, primary_key=True),
    Column("state", Text, nullable=False),
    Column("corpus_id", Text, nullable=False),
    Column("model_name", Text, nullable=False),
    Column("recipe", JsonText, nullable=False),
    Column("create_time_ns", BigInteger, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("last_sequence", BigInteger, nullable=False),
    Column("cancel_requested", Boolean, nullable=False),
    Column("model_version", BigInteger),
    Column("progress", JsonText, nullable=False),
    Column("failure", JsonText),
    Column("worker_pid", Integer),
    Column("worker_start_ticks", BigInteger),
    Column("worker_boot_id", Text),
    Column("start_time_ns", BigInteger),
    Column("end_time_ns", BigInteger),
    Column("request_id", Text, unique=True),
    Column("body_digest", Text),
    Column("pause_requested", Boolean, nullable=False, server_default=false()),
    Column("restarts", Integer, nullable=False, server_default="0"),
    Column("not_before_ns", BigInteger, nullable=False, server_default="0"),
    Column("processes", Integer, nullable=False, server_default="1"),
    Column("initial_model", Text, nullable=False, server_default=""),
    Column("keep_optimizer", Boolean, nullable=False, server_default=false()),
    Column("trace_context", Text, nullable=False, server_default=""),
    Index(None, "create_time_ns", "run_id"),
    Index(None, "state"),
)

records: Final = Table(
    "records",
    metadata,
    Column("run_id", Text, ForeignKey("runs.run_id"), primary_key=True),
    Column("sequence", BigInteger, primary_key=True, autoincrement=False),
    Column("time_ns", BigInteger, nullable=False),
    Column("kind", Text, nullable=False),
    Column("payload", JsonText, nullable=False),
)

corpora: Final = Table(
    "corpora",
    metadata,
    Column("corpus_id", Text, primary_key=True),
    Column("display_name", Text, nullable=False),
    Column("source_language", Text, nullable=False),
    Column("target_language", Text, nullable=False),
    Column("train", JsonText, nullable=False),
    Column("validation", JsonText, nullable=False),
    Column("digest", Text, nullable=False),
    Column("create_time_ns", BigInteger, nullable=False),
    Column("request_id", Text, unique=True),
    Index(None, "create_time_ns", "corpus_id"),
)

models: Final = Table(
    "models",
    metadata,
    Column("name", Text, primary_key=True),
    # The highest number that a version has ever had. The row outlives its versions: no number comes twice.
    Column("last_version", BigInteger, nullable=False),
)

model_versions: Final = Table(
    "model_versions",
    metadata,
    Column("name", Text, primary_key=True),
    Column("version", BigInteger, primary_key=True, autoincrement=False),
    Column("lineage", JsonText, nullable=False),
    Column("scores", JsonText, nullable=False),
    Column("parameters", BigInteger, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("digest", Text, nullable=False),
    Column("create_time_ns", BigInteger, nullable=False),
    Column("int8", JsonText),
)

model_aliases: Final = Table(
    "model_aliases",
    metadata,
    Column("name", Text, primary_key=True),
    Column("alias", Text, primary_key=True),
    Column("version", BigInteger, nullable=False),
    Column("update_time_ns", BigInteger, nullable=False),
    # Whatever an alias names is there.
    ForeignKeyConstraint(["name", "version"], ["model_versions.name", "model_versions.version"]),
)

pending_folders: Final = Table(
    "pending_folders",
    metadata,
    # Relative to the data folder. What a crash leaves of a publication or a deletion is known by its row here.
    Column("path", Text, primary_key=True),
    Column("change", Text, nullable=False),
    Column("time_ns", BigInteger, nullable=False),
)
