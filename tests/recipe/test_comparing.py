"""`gyro compare`: two recipes over seeds, and two models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from gyrocompass.core.store import Store
from gyrocompass.recipe.comparing import seeded
from gyrocompass.recipe.recipe import load_recipe
from gyrocompass.recipe.run import read_run
from tiny_recipe import FinishedRun, write_recipe

Run = Callable[..., tuple[int, str, str]]


def variant_of(folder: Path, recipe: Path, name: str, old: str, new: str) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(recipe.read_text().replace("name: tiny", f"name: {name}").replace(old, new))
    return path


@pytest.mark.slow
def test_a_recipe_that_learns_less_is_worse(tmp_path: Path, gyro: Run) -> None:
    recipe = write_recipe(tmp_path)
    recipe.write_text(recipe.read_text().replace("held_out_share: 0.25", "held_out_share: 0.5"))
    long = variant_of(tmp_path, recipe, "long", "steps: 4", "steps: 40")
    code, out, err = gyro("compare", recipe, long, "--seeds", 2, "--store", tmp_path / "store")
    assert code == 0, err
    found = json.loads((tmp_path / "store" / "comparisons" / "tiny-long.json").read_text())
    (total,) = [line for line in found["lines"] if line["slice"] == "total"]
    assert total["verdict"] == "worse" and 0 < total["low"] < total["difference"] < total["high"]
    assert len(total["by_seed"]) == 2 and total["by_seed"][0] != total["by_seed"][1]
    assert found["costs"][0]["steps"] < found["costs"][1]["steps"]
    assert "by seed" in out
    again = gyro("compare", recipe, long, "--seeds", 2, "--store", tmp_path / "store")[1]
    assert again.split("by seed")[1] == out.split("by seed")[1], "all of it is found again"


def test_seeds_change_models_and_training_alone(finished_run: FinishedRun) -> None:
    recipe = load_recipe(str(finished_run.recipe))
    other = seeded(recipe, 2)
    assert seeded(recipe, 0) == recipe and other.name == "tiny-seed2"
    changed = {name for name in recipe.stages if recipe.stages[name] != other.stages[name]}
    assert changed == {"untrained", "pretrained", "fine_tuned"}


def test_two_models_on_the_same_files(finished_run: FinishedRun, tmp_path: Path, gyro: Run) -> None:
    ids = {stage.name: stage.artifact for stage in read_run(Store(finished_run.store), "tiny").stages}
    for number in range(8):
        (tmp_path / f"text_{number}.txt").write_text(
            f"def take_{number}(first, second):\n    return second\n" * 3
        )
    asked = ("compare", ids["untrained"], ids["fine_tuned"], "--data", *sorted(tmp_path.glob("*.txt")))
    code, out, err = gyro(*asked, "--store", finished_run.store)
    assert code == 0, err
    assert "worse" in out and "groups" in out
    same = gyro("compare", ids["untrained"], ids["untrained"], *asked[3:], "--store", finished_run.store)[1]
    assert "no difference shown" in same


@pytest.mark.parametrize(
    ("changes", "message"),
    [("", "both recipes are called tiny"), ("name: other", "scores nothing")],
)
def test_bad_input_is_told(tmp_path: Path, gyro: Run, changes: str, message: str) -> None:
    recipe = write_recipe(tmp_path)
    other = tmp_path / "other.yaml"
    text = recipe.read_text()
    if changes:
        text = "\n".join(line for line in text.splitlines() if "kind: score" not in line)
        text = text.replace("name: tiny", changes)
    other.write_text(text)
    code, _, err = gyro("compare", recipe, other, "--seeds", 1, "--store", tmp_path / "store")
    assert code == 2 and message in err
