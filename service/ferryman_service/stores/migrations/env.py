"""Run by Alembic, on the connection that stores/database.py hands over and within its transaction."""

from __future__ import annotations

from alembic import context

from ferryman_service.stores.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
