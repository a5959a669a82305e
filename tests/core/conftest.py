"""Stores for the tests: each conformance test runs on SQLite and, where a server is named, on PostgreSQL."""

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.pool import NullPool

from gyrocompass.core.store import Store


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def store_url(request: pytest.FixtureRequest) -> Iterator[str | None]:
    """The URL of an empty database, or None for SQLite in the store's folder."""
    if request.param == "sqlite":
        yield None
        return
    server = os.environ.get("GYRO_TEST_POSTGRES_URL")
    if not server:
        pytest.skip("GYRO_TEST_POSTGRES_URL names no server")
    schema = f"gyro_test_{secrets.token_hex(6)}"
    url = make_url(server).set(drivername="postgresql")
    engine = create_engine(url.set(drivername="postgresql+psycopg"), poolclass=NullPool)
    with engine.begin() as connection:
        connection.execute(text(f"CREATE SCHEMA {schema}"))
    yield url.update_query_dict({"options": f"-csearch_path={schema}"}).render_as_string(hide_password=False)
    with engine.begin() as connection:
        connection.execute(text(f"DROP SCHEMA {schema} CASCADE"))


@pytest.fixture
def store(tmp_path: Path, store_url: str | None) -> Store:
    return Store(tmp_path / "store", store_url)
