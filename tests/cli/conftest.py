"""Commands as a user types them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from gyrocompass.cli.main import main

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
