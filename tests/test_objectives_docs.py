"""The list of objectives is whole, and its YAML is a config."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from gyrocompass.loss.objective import OBJECTIVES
from gyrocompass.measure.rewards.entries import parse_rewards, reward_models
from gyrocompass.recipe.stages.train import TrainStage
from gyrocompass.train.config import TrainConfig

DOCS = (Path(__file__).parents[1] / "docs" / "objectives.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```yaml\n(.*?)```", DOCS, re.DOTALL)


def test_every_objective_stands_in_the_tables() -> None:
    listed = re.findall(r"^\| `(\w+)` \|", DOCS, re.MULTILINE)
    assert sorted(listed) == sorted(OBJECTIVES)


def test_the_example_is_a_config() -> None:
    TrainConfig.model_validate({"steps": 1, **yaml.safe_load(EXAMPLES[0])})


@pytest.mark.parametrize("line", "".join(EXAMPLES[1:3]).splitlines())
def test_each_way_to_a_reference_is_a_stages_key(line: str) -> None:
    entry = yaml.safe_load(line)
    beside = {"reference_without_lora": {"lora": {}}, "reference_update": {"reference": "m"}}
    plain = {"model": "m", "data": "d", "steps": 1, "objective": ["dpo"]}
    TrainStage.model_validate(plain | beside.get(*entry, {}) | entry)


def test_a_reward_model_is_a_reward() -> None:
    (rewards,) = yaml.safe_load(EXAMPLES[3]).values()
    assert reward_models(rewards) == {"1.reward_model.model": "judge"}
    assert [part.reward.name for part in parse_rewards(rewards).parts] == ["parses", "reward_model"]
