"""The store of the tests here: empty, on SQLite and, where a server is named, on PostgreSQL."""

from pathlib import Path

import pytest

from gyrocompass.core.store import Store


@pytest.fixture
def store(tmp_path: Path, store_url: str | None) -> Store:
    return Store(tmp_path / "store", store_url)
