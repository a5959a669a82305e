"""One finished run of the tiny recipe, for all tests that only read."""

from __future__ import annotations

import pytest

from gyrocompass.cli.main import main
from tiny_recipe import FinishedRun, write_recipe


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    folder = tmp_path_factory.mktemp("finished")
    recipe = write_recipe(folder)
    assert main(["run", str(recipe), "--store", str(folder / "store")]) == 0
    return FinishedRun(recipe, folder / "store")
