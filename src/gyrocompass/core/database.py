"""The store's database: SQLite in a file, or PostgreSQL by URL, always at the newest schema.

A store has many readers and one writer at a time: a writing transaction takes a lock when it begins
(`BEGIN IMMEDIATE` in SQLite, an advisory lock in PostgreSQL), so that two processes neither deadlock nor
find that what they read has changed. Migrations run inside such a transaction, so processes that open a new
store at once migrate it once. Connections are not pooled: stages write seldom, and processes fork.

SQLite keeps its rollback journal; its write-ahead log does not work on network file systems.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, inspect, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DatabaseError, OperationalError
from sqlalchemy.pool import NullPool

from gyrocompass.core.errors import BadInput, GyroError, MissingDependency
from gyrocompass.core.tables import Table

SCHEMA = "0004"
"""The newest revision in `migrations/versions/`."""

_WAIT_S = 300
"""How long a SQLite writer waits for another to finish."""
_WRITER_LOCK = 0x6779726F
"""The key of PostgreSQL's advisory lock ("gyro")."""
_BATCH_ROWS = 1000


class Database:
    """Reading and writing transactions on the store's tables.

    Args:
        url: `sqlite:///path` or `postgresql://user@host/name`.

    Raises:
        BadInput: the URL is not one, or names another sort of database.
        MissingDependency: the URL is PostgreSQL's, and its driver is not installed.
        GyroError: the database cannot be reached, or a newer version of Gyrocompass has migrated it.
    """

    def __init__(self, url: str | URL) -> None:
        self._engine = _engine(url)
        self.place = self._engine.url.render_as_string(hide_password=True)
        self._migrate()

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that only reads."""
        with self._connection() as connection, connection.begin():
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """The one transaction that writes; undone if the block raises."""
        with self._connection() as connection:
            writer = connection.execution_options(gyro_writes=True)
            with writer.begin():
                if writer.dialect.name == "postgresql":
                    writer.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _WRITER_LOCK})
                yield writer

    @contextmanager
    def _connection(self) -> Iterator[Connection]:
        try:
            with self._engine.connect() as connection:
                yield connection
        except DatabaseError as error:
            # Its other children (integrity, programming) are bugs of ours.
            if type(error) not in (DatabaseError, OperationalError):
                raise
            raise GyroError(
                f"the store's database does not work: {error.orig}",
                where=self.place,
                fix="check that it is reachable, writable and not full, and that the file is a store's",
            ) from error

    def _migrate(self) -> None:
        with self.read() as connection:
            if _revision(connection) == SCHEMA:
                return
        # Only now, as Alembic takes its time to import and most openings need no migration.
        from alembic import command
        from alembic.config import Config
        from alembic.util import CommandError

        config = Config()
        folder = Path(__file__).parent / "migrations"
        config.set_main_option("script_location", str(folder).replace("%", "%%"))
        with self.write() as connection:
            config.attributes["connection"] = connection
            try:
                command.upgrade(config, SCHEMA)
            except CommandError as error:
                raise GyroError(
                    f"the store has schema {_revision(connection)}; this version of Gyrocompass knows "
                    f"schemas up to {SCHEMA}",
                    where=self.place,
                    fix="use a newer version of Gyrocompass, or another store",
                ) from error


def upsert(
    connection: Connection,
    table: type[Table],
    rows: Iterable[Mapping[str, Any]],
    *,
    renewed: Collection[str] = (),
) -> None:
    """Insert rows; of a row whose key exists already, only the renewed columns change.

    Args:
        connection: a writing transaction.
        table: the table's class.
        rows: every column of each row, by name; streamed in batches.
        renewed: the columns in which a new row wins over one that exists.
    """
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    statement = dialect.insert(table)
    keys = [column.name for column in inspect(table).primary_key]
    if renewed:
        values = {name: statement.excluded[name] for name in renewed}
        statement = statement.on_conflict_do_update(index_elements=keys, set_=values)
    else:
        statement = statement.on_conflict_do_nothing(index_elements=keys)
    remaining = iter(rows)
    while batch := list(itertools.islice(remaining, _BATCH_ROWS)):
        connection.execute(statement, batch)


def _engine(url: str | URL) -> Engine:
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise BadInput("this is not the URL of a database", where=url, fix=_URL_FIX) from error
    if parsed.drivername in ("postgres", "postgresql", "postgresql+psycopg"):
        try:
            return create_engine(parsed.set(drivername="postgresql+psycopg"), poolclass=NullPool)
        except ModuleNotFoundError as error:
            raise MissingDependency(
                "psycopg", extra="postgres", needed_for="a store in PostgreSQL"
            ) from error
    if parsed.drivername != "sqlite" or not parsed.database:
        shown = parsed.render_as_string(hide_password=True)
        raise BadInput("a store's database is a SQLite file or PostgreSQL", where=shown, fix=_URL_FIX)
    engine = create_engine(parsed, poolclass=NullPool, connect_args={"timeout": _WAIT_S})
    event.listen(engine, "connect", _configure_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


_URL_FIX = "for example postgresql://user@host/name, or none for a SQLite file in the store's folder"


def _configure_sqlite(connection: Any, _record: object) -> None:
    # Python's driver begins transactions late and not before DDL; SQLAlchemy begins them here instead.
    connection.isolation_level = None
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA secure_delete = ON")  # what is forgotten is not left in free pages


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get("gyro_writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _revision(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    revision: str | None = connection.scalar(text("SELECT version_num FROM alembic_version"))
    return revision
