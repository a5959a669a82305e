import doctest
import importlib
import pickle
import subprocess
import sys

import pytest

from gyrocompass.core import errors
from gyrocompass.core.errors import (
    BadInput,
    ConfigError,
    DamagedArtifact,
    GyroError,
    MissingDependency,
    TrainingStopped,
    did_you_mean,
    nearest,
)


def test_an_error_says_what_where_and_what_to_do():
    error = GyroError("the disk is full", where="/data", fix="free some space")
    assert str(error) == "the disk is full\n  where: /data\n  fix: free some space"
    assert str(GyroError("the disk is full")) == "the disk is full"


def test_exit_codes():
    codes = {kind: kind.exit_code for kind in (GyroError, DamagedArtifact, TrainingStopped)}
    assert set(codes.values()) == {1}
    assert {kind.exit_code for kind in (BadInput, ConfigError, MissingDependency)} == {2}


def test_missing_dependency_names_the_command():
    error = MissingDependency("peft", extra="lora", needed_for="LoRA")
    assert "pip install 'gyrocompass[lora]'" in str(error)


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("no", where="a:1", fix="yes"),
        MissingDependency("peft", extra="lora", needed_for="LoRA"),
    ],
)
def test_errors_cross_processes_whole(error):
    again = pickle.loads(pickle.dumps(error))  # noqa: S301  what multiprocessing does
    assert (type(again), str(again)) == (type(error), str(error))


def test_nearest_overlooks_case_and_dashes():
    assert nearest("Learning-Rat", ["steps", "learning_rate"]) == "learning_rate"
    assert did_you_mean("x", []) == ""


@pytest.mark.parametrize(
    "module", ["errors", "config", "config_errors", "yaml_source", "artifact", "progress", "store", "lineage"]
)
def test_doctests(module):
    assert doctest.testmod(importlib.import_module(f"gyrocompass.core.{module}")).failed == 0


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        (errors.__name__, ["pydantic", "yaml", "rich", "sqlalchemy", "alembic", "numpy", "torch"]),
        ("gyrocompass.core.config", ["rich", "sqlalchemy", "alembic", "numpy", "torch"]),
        ("gyrocompass.core.artifact", ["rich", "sqlalchemy", "alembic", "numpy", "torch"]),
        ("gyrocompass.core.progress", ["rich", "pydantic", "torch"]),
        ("gyrocompass.core.lineage", ["rich", "alembic", "numpy", "torch"]),
    ],
)
def test_importing_brings_nothing_heavy(module, absent):
    code = f"import sys, {module}; print(*[name for name in {absent!r} if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert loaded.split() == []
