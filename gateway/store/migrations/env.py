"""Alembic's entry: runs the migrations on the connection that `gateway.store.schema.upgrade` hands in."""

from __future__ import annotations

from alembic import context

from gateway.store.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    transactional_ddl=True,  # the caller's transaction: all of an upgrade or nothing
    render_as_batch=True,
)
context.run_migrations()
