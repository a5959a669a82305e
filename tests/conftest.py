"""One finished run of the tiny recipe, for all tests that only read, and commands as a user types them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gyrocompass.cli.main import main
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
