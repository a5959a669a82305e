"""Stages that judge samples: their rewards, of which some are reward models that other stages made.

    rewards:
      - parses
      - reward_model: {model: STAGE, low: -5, high: 5}

`model` is a reference like any other: checked when the recipe is read, with its line; an input of the stage,
so that its cache key covers the reward model's content and lineage knows of it. A reward model reads the
tokens that the policy read and wrote, so both have one vocabulary.

Left out: reward models with a tokenizer of their own, which would have to read the conversation again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gyrocompass.core.errors import BadInput, ConfigError
from gyrocompass.data.tokens import TokenDataset, TokenRow
from gyrocompass.measure.reward import Sample
from gyrocompass.measure.reward_calibration import load_calibration
from gyrocompass.measure.rewards.entries import parse_rewards, reward_models
from gyrocompass.measure.rewards.registry import Scorer, Tools
from gyrocompass.model.fit import check_context
from gyrocompass.model.head import context_length
from gyrocompass.model.open import open_model
from gyrocompass.model.reward_model import RewardModel
from gyrocompass.model.scalar_head import has_scalar_head
from gyrocompass.recipe.stage import Stage, Workplace
from gyrocompass.recipe.stages.model import check_same_vocabulary
from gyrocompass.train.config import placed

REWARD_MODEL = ("model",)
"""What the stage behind a reward model has to make."""


class JudgingStage(Stage):
    """A stage with `rewards`."""

    rewards: tuple[str | dict[str, Any], ...] = ()

    def reward_lists(self) -> Mapping[str, Sequence[str | Mapping[str, Any]]]:
        """Its lists of rewards, by the path of their key."""
        return {"rewards": self.rewards}

    def reward_models(self) -> dict[str, str]:
        """For each role, the stage whose reward model it is: `rewards.1.reward_model.model`."""
        return {
            f"{path}.{below}": name
            for path, entries in self.reward_lists().items()
            for below, name in reward_models(entries).items()
        }

    def check_rewards(self) -> None:
        """Refuse rewards that are not there or are told what they do not know.

        Raises:
            MistakesBelow: with the path of each mistake.
        """
        for path, entries in self.reward_lists().items():
            try:
                if entries:
                    parse_rewards(entries, where=path)
            except ConfigError as error:
                raise placed(error) from error

    def references(self) -> dict[str, str]:
        """See `Stage`; reward models too."""
        return super().references() | self.reward_models()

    def wanted(self, role: str) -> tuple[str, ...]:
        """See `Stage`."""
        return REWARD_MODEL if role in self.reward_models() else super().wanted(role)

    def settings(self) -> dict[str, Any]:
        """See `Stage`; the names of reward models' stages are left out too."""
        settings = super().settings()
        for role in self.reward_models():
            *path, last = role.split(".")
            at: Any = settings
            for key in path:
                at = at[int(key)] if isinstance(at, list) else at[key]
            del at[last]
        return settings

    def tools(
        self, workplace: Workplace, *, dtype: torch.dtype, length: int, rows: int, autocast: bool = False
    ) -> Tools:
        """What its rewards are given: its reward models, opened, by the names of their stages.

        Args:
            workplace: with the reward models and the policy, `model`, among its inputs.
            dtype: of the weights.
            length: the most tokens of a sample with its prompt, less one.
            rows: rows in a batch.
            autocast: compute as bf16 autocast does.

        Raises:
            BadInput: one of them has no scalar head, another vocabulary or too short a context.
        """
        scorers: dict[str, Scorer] = {}
        for role, name in self.reward_models().items():
            if name not in scorers:
                where = f"stages.{workplace.name}.{role}"
                check_same_vocabulary(workplace.input("model"), workplace.input(role), where)
                judge = _open(workplace.input(role), dtype, workplace.world.device, length, where)
                scorers[name] = partial(_score, judge, length, rows, autocast)
        return Tools(scorers=scorers)


def _open(folder: Path, dtype: torch.dtype, device: torch.device, length: int, where: str) -> RewardModel:
    model: nn.Module = open_model(folder, dtype=dtype, device=device)
    if not has_scalar_head(model):
        raise BadInput(
            "this model has no scalar head, so it is no reward model",
            where=where,
            fix="name a model that was trained with `scalar_head: true`",
        )
    check_context(context_length(model), length, where)
    return RewardModel(model, load_calibration(folder))


def _score(
    judge: RewardModel, length: int, rows: int, autocast: bool, samples: Sequence[Sample]
) -> list[float]:
    """Calibrated rewards of samples, read as the tokens that the policy read and wrote."""
    if not samples:
        return []
    data = TokenDataset.of(_row(str(number), sample) for number, sample in enumerate(samples))
    rewards: list[float] = judge.rewards(data, length, rows, autocast=autocast).tolist()
    return rewards


def _row(name: str, sample: Sample) -> TokenRow:
    n_prompt, n_written = len(sample.prompt_ids), len(sample.token_ids)
    assert n_prompt and n_written, "samples of rollouts have their tokens"
    ids = [*sample.prompt_ids, *sample.token_ids]
    return TokenRow(name, "", "", ids, [0] * len(ids), [0.0] * n_prompt + [1.0] * n_written, unit=name)
