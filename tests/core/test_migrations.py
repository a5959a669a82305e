from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import text

from databases import IN_A_FILE
from gyrocompass.core import database
from gyrocompass.core.errors import GyroError
from gyrocompass.core.store import Store
from gyrocompass.core.tables_registry import Table


def test_the_newest_revision_is_the_one_the_code_expects():
    config = Config()
    config.set_main_option("script_location", str(Path(database.__file__).parent / "migrations"))
    assert ScriptDirectory.from_config(config).get_heads() == [database.SCHEMA]


def test_migrations_make_the_tables_of_the_models(store):
    with store.database.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Table.metadata) == []


def test_a_newer_store_is_left_alone(store, store_url):
    with store.database.write() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(GyroError, match="schema 9999; this version of Gyrocompass knows"):
        Store(store.root, store_url)


def test_a_migration_that_fails_leaves_nothing(tmp_path, store_url, monkeypatch):
    def fail(*_arguments, **_options):
        raise RuntimeError("no more tables today")

    with monkeypatch.context() as patch:
        patch.setattr("alembic.operations.Operations.create_table", fail)
        patch.setattr("alembic.op.create_table", fail, raising=False)
        with pytest.raises(RuntimeError, match="no more tables"):
            Store(tmp_path / "store", store_url)
    assert Store(tmp_path / "store", store_url).artifacts() == []


@IN_A_FILE
def test_a_store_may_stand_below_odd_names(tmp_path):
    assert Store(tmp_path / "50% odd?name#é").artifacts() == []
    assert (tmp_path / "50% odd?name#é" / "store.sqlite").is_file()
