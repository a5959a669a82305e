"""Where tests' stores keep their tables.

Each store that names no database has SQLite in its folder. With GYRO_TEST_STORES=postgresql it has a schema
of its own in the server that GYRO_TEST_POSTGRES_URL names, found by the folder's path, so that all tests,
and the processes that they start, run on PostgreSQL without knowing it.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import Connection, create_engine, inspect, make_url, text
from sqlalchemy.engine import URL
from sqlalchemy.pool import NullPool

from gyrocompass.core import store as store_module
from gyrocompass.core.tables import Table

SERVER = os.environ.get("GYRO_TEST_POSTGRES_URL")
ON_POSTGRES = os.environ.get("GYRO_TEST_STORES") == "postgresql"
SESSION = os.environ.setdefault("GYRO_TEST_SESSION", secrets.token_hex(4))
"""Of these tests and of the processes that they start."""
IN_A_FILE = pytest.mark.skipif(ON_POSTGRES, reason="about the file that SQLite keeps")


@contextmanager
def server() -> Iterator[Connection]:
    """The server, each statement on its own."""
    assert SERVER is not None, "GYRO_TEST_POSTGRES_URL names no server"
    url = make_url(SERVER).set(drivername="postgresql+psycopg")
    with create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT").connect() as connection:
        yield connection


@contextmanager
def schema() -> Iterator[str]:
    """The URL of an empty database, gone afterwards."""
    name = f"gyro_test_{SESSION}_{secrets.token_hex(6)}"
    with server() as connection:
        connection.execute(text(f"CREATE SCHEMA {name}"))
    yield _url(name).render_as_string(hide_password=False)
    with server() as connection:
        connection.execute(text(f"DROP SCHEMA {name} CASCADE"))


def drop_all() -> None:
    """Take away what stores of this session left."""
    with server() as connection:
        for name in inspect(connection).get_schema_names():
            if name.startswith(f"gyro_test_{SESSION}_"):
                connection.execute(text(f"DROP SCHEMA {name} CASCADE"))


def copied(store: Path, to: Path) -> Path:
    """A store's copy, with what its tables hold."""
    shutil.copytree(store, to)
    if ON_POSTGRES:
        store_module.Store(to)
        tables = [table.name for table in Table.metadata.sorted_tables]
        with server() as connection:
            for name in tables:
                rows = f"SELECT * FROM {_schema(store)}.{name}"
                connection.execute(text(f"INSERT INTO {_schema(to)}.{name} {rows}"))
    return to


def stored_in(store: Path) -> list[str]:
    """How a program that knows nothing of these tests is told of a store."""
    url = ["--store-url", _beside(store).render_as_string(hide_password=False)] if ON_POSTGRES else []
    return ["--store", str(store), *url]


def _beside(root: Path) -> URL:
    name = _schema(root)
    with server() as connection:
        connection.execute(text(f"CREATE SCHEMA IF NOT EXISTS {name}"))
    return _url(name)


def _schema(root: Path) -> str:
    return f"gyro_test_{SESSION}_{hashlib.sha256(str(root.absolute()).encode()).hexdigest()[:16]}"


def _url(name: str) -> URL:
    assert SERVER is not None
    return (
        make_url(SERVER).set(drivername="postgresql").update_query_dict({"options": f"-csearch_path={name}"})
    )


if ON_POSTGRES:
    store_module.beside = _beside
