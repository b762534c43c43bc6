"""The tables of version 0.1.0."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    _create_runs()
    _create_models()
    op.create_table(
        "corpora",
        sa.Column("corpus_id", sa.Text, nullable=False),
        sa.Column("display_name", sa.Text, nullable=False),
        sa.Column("source_language", sa.Text, nullable=False),
        sa.Column("target_language", sa.Text, nullable=False),
        sa.Column("train", sa.Text, nullable=False),
        sa.Column("validation", sa.Text, nullable=False),
        sa.Column("digest", sa.Text, nullable=False),
        sa.Column("create_time_ns", sa.BigInteger, nullable=False),
        sa.Column("request_id", sa.Text),
        sa.PrimaryKeyConstraint("corpus_id", name="pk_corpora"),
        sa.UniqueConstraint("request_id", name="uq_corpora_request_id"),
    )
    op.create_index("ix_corpora_create_time_ns_corpus_id", "corpora", ["create_time_ns", "corpus_id"])
    op.create_table(
        "pending_folders",
        sa.Column("path", sa.Text, nullable=False),
        sa.Column("change", sa.Text, nullable=False),
        sa.Column("time_ns", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("path", name="pk_pending_folders"),
    )


def _create_runs() -> None:
    op.create_table(
        "runs",
        sa.Column("run_id", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("corpus_id", sa.Text, nullable=False),
        sa.Column("model_name", sa.Text, nullable=False),
        sa.Column("recipe", sa.Text, nullable=False),
        sa.Column("create_time_ns", sa.BigInteger, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("last_sequence", sa.BigInteger, nullable=False),
        sa.Column("cancel_requested", sa.Boolean, nullable=False),
        sa.Column("model_version", sa.BigInteger),
        sa.Column("progress", sa.Text, nullable=False),
        sa.Column("failure", sa.Text),
        sa.Column("worker_pid", sa.Integer),
        sa.Column("worker_start_ticks", sa.BigInteger),
        sa.Column("worker_boot_id", sa.Text),
        sa.Column("start_time_ns", sa.BigInteger),
        sa.Column("end_time_ns", sa.BigInteger),
        sa.Column("request_id", sa.Text),
        sa.Column("body_digest", sa.Text),
        sa.Column("pause_requested", sa.Boolean, nullable=False, server_default=sa.false()),
        sa.Column("restarts", sa.Integer, nullable=False, server_default="0"),
        sa.Column("not_before_ns", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("processes", sa.Integer, nullable=False, server_default="1"),
        sa.Column("initial_model", sa.Text, nullable=False, server_default=""),
        sa.Column("keep_optimizer", sa.Boolean, nullable=False, server_default=sa.false()),
        sa.Column("trace_context", sa.Text, nullable=False, server_default=""),
        sa.PrimaryKeyConstraint("run_id", name="pk_runs"),
        sa.UniqueConstraint("request_id", name="uq_runs_request_id"),
    )
    op.create_index("ix_runs_create_time_ns_run_id", "runs", ["create_time_ns", "run_id"])
    op.create_index("ix_runs_state", "runs", ["state"])
    op.create_table(
        "records",
        sa.Column("run_id", sa.Text, nullable=False),
        sa.Column("sequence", sa.BigInteger, nullable=False, autoincrement=False),
        sa.Column("time_ns", sa.BigInteger, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("payload", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("run_id", "sequence", name="pk_records"),
        sa.ForeignKeyConstraint(["run_id"], ["runs.run_id"], name="fk_records_run_id"),
    )


def _create_models() -> None:
    op.create_table(
        "models",
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("last_version", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_models"),
    )
    op.create_table(
        "model_versions",
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("version", sa.BigInteger, nullable=False, autoincrement=False),
        sa.Column("lineage", sa.Text, nullable=False),
        sa.Column("scores", sa.Text, nullable=False),
        sa.Column("parameters", sa.BigInteger, nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.Column("digest", sa.Text, nullable=False),
        sa.Column("create_time_ns", sa.BigInteger, nullable=False),
        sa.Column("int8", sa.Text),
        sa.PrimaryKeyConstraint("name", "version", name="pk_model_versions"),
    )
    op.create_table(
        "model_aliases",
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("alias", sa.Text, nullable=False),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("update_time_ns", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("name", "alias", name="pk_model_aliases"),
        sa.ForeignKeyConstraint(
            ["name", "version"],
            ["model_versions.name", "model_versions.version"],
            name="fk_model_aliases_name_version",
        ),
    )
