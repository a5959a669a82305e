"""One finished run of the tiny recipe, commands as a user types them, and databases of both sorts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import databases
from gyrocompass.cli.main import main
from gyrocompass.core.database import Database
from gyrocompass.core.store import Store
from gyrocompass.data.tokenizer import load_tokenizer
from gyrocompass.model.open import open_model
from gyrocompass.recipe.run import read_run
from tiny_recipe import FinishedRun, write_recipe


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    folder = tmp_path_factory.mktemp("finished")
    recipe = write_recipe(folder)
    assert main(["run", str(recipe), "--store", str(folder / "store")]) == 0
    return FinishedRun(recipe, folder / "store")


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def gyro(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command: exit code, standard output, standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture(scope="session")
def model_folder(finished_run: FinishedRun) -> Path:
    store = Store(finished_run.store)
    ids = {stage.name: stage.artifact for stage in read_run(store, "tiny").stages}
    return store.open(ids["fine_tuned"]).path


@pytest.fixture(scope="session")
def speaking(model_folder: Path) -> tuple[Any, Any]:
    model = open_model(model_folder, dtype=torch.float32, device=torch.device("cpu"))
    return model, load_tokenizer(model_folder)


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def store_url(request: pytest.FixtureRequest) -> Iterator[str | None]:
    """The URL of an empty database, or None for SQLite in the store's folder."""
    if request.param == "sqlite":
        yield None
        return
    if not databases.SERVER:
        pytest.skip("GYRO_TEST_POSTGRES_URL names no server")
    with databases.schema() as url:
        yield url


@pytest.fixture
def database(store_url: str | None, tmp_path: Path) -> Database:
    """An empty database, without a store around it."""
    return Database(store_url or f"sqlite:///{tmp_path / 'alone.sqlite'}")


@pytest.fixture(scope="session", autouse=True)
def _schemas() -> Iterator[None]:
    """Stores' schemas go with the session, where they have any."""
    yield
    if databases.ON_POSTGRES:
        databases.drop_all()
