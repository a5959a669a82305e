"""One finished run of the tiny recipe, for all tests that only read, and commands as a user types them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from gyrocompass.cli.main import main
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
