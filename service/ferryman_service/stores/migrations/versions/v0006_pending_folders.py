"""Folders that are about to be published or deleted: what a crash leaves of them is known for what it is."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "pending_folders",
        sa.Column("path", sa.Text, nullable=False),
        sa.Column("change", sa.Text, nullable=False),
        sa.Column("time_ns", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("path", name="pk_pending_folders"),
    )
