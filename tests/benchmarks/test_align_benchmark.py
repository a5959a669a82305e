"""The benchmark of alignment compares like with like: everybody's steps have one loss, whoever takes them."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from rich.console import Console

FOLDER = Path(__file__).parents[2] / "benchmarks"
STEPS = 3


@pytest.fixture(autouse=True)
def on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmarks are scripts that import their neighbours."""
    monkeypatch.syspath_prepend(FOLDER)
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    sys.path.insert(0, str(FOLDER))
    try:
        import_module("align_models").prepare_model(folder, small=True)
    finally:
        sys.path.remove(str(FOLDER))
    return folder


def module(name: str) -> ModuleType:
    return import_module(name)


class EnoughError(Exception):
    """Ends a training."""


def steps_of(name: str, task: Any, folder: Path) -> list[Any]:
    """What a contender's first steps say."""
    said: list[Any] = []

    def pace(last: Callable[[], Any] | None, apart_s: float) -> None:
        if last is not None:
            said.append(last())
        if len(said) == STEPS:
            raise EnoughError

    with pytest.raises(EnoughError):
        module("align_contenders").CONTENDERS[name].run(task, pace, folder)
    return said


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_everybody_takes_the_same_steps(kind: str, model: Path, tmp_path: Path) -> None:
    contenders = module("align_contenders")
    task = contenders.Task(kind, str(model), sequences=4, length=12, dtype="float32")
    expected = [tuple(said) for said in steps_of("ours", task, tmp_path / "ours")]
    assert expected[0] != expected[1]
    for name, contender in contenders.CONTENDERS.items():
        if (
            name == "ours"
            or kind not in contender.kinds
            or (contender.package and not _has(contender.package))
        ):
            continue
        found = [tuple(said) for said in steps_of(name, task, tmp_path / name)]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def _has(package: str) -> bool:
    try:
        import_module(package)
    except ImportError:
        return False
    return True


def laps(*seconds: float, peak_bytes: int = 2**20, loss: float = 2.0) -> list[Any]:
    return [module("align_worker").Lap(s, 2 * s, loss, loss, peak_bytes) for s in seconds]


def test_rounds_begin_with_another_each_and_ratios_are_over_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    align, asked = module("align"), []
    seconds = {"ours": [9.0, 1.0, 2.0], "trl": [9.0, 4.0, 3.0]}

    class Fixed:
        """A worker that takes as long as it is told."""

        def __init__(self, name: str, task: object, threads: int) -> None:
            self.name, self.laps = name, laps(*seconds[name], peak_bytes=2**20 * (2 if name == "trl" else 1))

        def __enter__(self) -> Fixed:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def ready(self) -> float:
            return 0.5

        def step(self) -> Any:
            asked.append(self.name)
            return self.laps.pop(0)

    monkeypatch.setattr(align, "Worker", Fixed)
    task = module("align_contenders").Task("sft", "nowhere", dtype="float32")
    found = align.measure(task, ["ours", "trl"], 2, 1, Console(quiet=True))
    assert asked == ["ours", "trl", "ours", "trl", "trl", "ours"]
    assert found["trl"].over(found["ours"]) == (3.0, statistics.median([4, 3]) / 1.5)
    text = align.report(task, found, [], Console(quiet=True))
    assert (
        "3.00 (medians 2.33, by CPU seconds 3.00) times TRL's tokens per second, 0.50 of its memory" in text
    )


def test_another_loss_ends_it() -> None:
    align = module("align")
    found = {
        name: align.Measured(name, laps(1.0, loss=loss)[0], [], 0.0)
        for name, loss in (("ours", 2.0), ("close", 2.0009), ("off", 2.002))
    }
    with pytest.raises(RuntimeError, match=r"off has 2\.002, ours 2\.0"):
        align.check_agreement(found, "float32", Console(quiet=True))
    align.check_agreement(found, "bfloat16", Console(quiet=True))


@pytest.mark.slow
def test_the_benchmark_runs_in_its_smallest_form(tmp_path: Path) -> None:
    command = [sys.executable, str(FOLDER / "align.py"), "--small", "--rounds", "1", "--threads", "1"]
    done = subprocess.run([*command, "--write", str(tmp_path)], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "DPO, 4 x 16 tokens, bfloat16" in done.stdout
    assert "times TRL's tokens per second" in (tmp_path / "align.md").read_text()
