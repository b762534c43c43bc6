"""Runs that pause, restart, take several processes and start from a published model."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("runs", sa.Column("pause_requested", sa.Boolean, nullable=False, server_default=sa.false()))
    op.add_column("runs", sa.Column("restarts", sa.Integer, nullable=False, server_default="0"))
    op.add_column("runs", sa.Column("not_before_ns", sa.BigInteger, nullable=False, server_default="0"))
    op.add_column("runs", sa.Column("processes", sa.Integer, nullable=False, server_default="1"))
    op.add_column("runs", sa.Column("initial_model", sa.Text, nullable=False, server_default=""))
    op.add_column("runs", sa.Column("keep_optimizer", sa.Boolean, nullable=False, server_default=sa.false()))
