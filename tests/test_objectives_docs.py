"""The list of objectives is whole, and its YAML is a config."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from gyrocompass.loss.objective import OBJECTIVES
from gyrocompass.train.config import TrainConfig

DOCS = (Path(__file__).parents[1] / "docs" / "objectives.md").read_text(encoding="utf-8")


def test_every_objective_stands_in_the_tables() -> None:
    listed = re.findall(r"^\| `(\w+)` \|", DOCS, re.MULTILINE)
    assert sorted(listed) == sorted(OBJECTIVES)


def test_the_example_is_a_config() -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", DOCS, re.DOTALL)
    TrainConfig.model_validate({"steps": 1, **yaml.safe_load(example)})
