"""Runs the migrations on the connection that ``database`` opened; there is no other way in."""

from alembic import context

from cipherfleet.kmc.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()
