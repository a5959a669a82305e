"""What Alembic runs: the migrations, on the connection and in the transaction of `database.py`."""

from alembic import context

from gyrocompass.core.tables_registry import Table

# SQLite alters a table by copying it, hence the batch mode for later migrations.
context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Table.metadata,
    render_as_batch=True,
    transactional_ddl=True,
)
context.run_migrations()
