"""Quality against diversity: what a model writes under several settings of sampling, and how good it is.

    task, settings --sweep--> for each setting: the deciding metric, distinct-1, distinct-2, self-BLEU

All settings get the same prompts, samples and seeds. Intervals are over the items' groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from pydantic import Field, model_validator

from gyrocompass.core.config import Config
from gyrocompass.measure.alignment import Figure
from gyrocompass.measure.diversity import distinct, self_bleu
from gyrocompass.measure.generate import Generate, Writing
from gyrocompass.measure.reward import Sample
from gyrocompass.measure.rewards.entries import parse_rewards
from gyrocompass.measure.tasks.task import AnswerTask, Item


class Setting(Config):
    """How tokens are drawn."""

    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=1)

    @property
    def label(self) -> str:
        """In a table."""
        parts = [f"T {self.temperature:g}"]
        parts += [f"top-p {self.top_p:g}"] if self.top_p < 1 else []
        return ", ".join([*parts, f"top-k {self.top_k}"] if self.top_k else parts)


class Sweep(Config):
    """Which settings, and how many samples of each prompt."""

    settings: tuple[Setting, ...] = Field(min_length=1)
    samples: int = Field(default=4, ge=2)
    most_items: int = Field(default=32, ge=1)

    @model_validator(mode="after")
    def _differ(self) -> Sweep:
        if len({setting.label for setting in self.settings}) < len(self.settings):
            raise ValueError("two settings are the same")
        return self


class SweepRow(NamedTuple):
    """One setting's figures on one task, as estimates with their interval."""

    task: str
    setting: str
    metric: str
    figures: dict[str, dict[str, Any]]
    """`score`, `distinct-1`, `distinct-2`, `self-BLEU`, each with value, low, high."""
    items: int


def sweep(task: AnswerTask, items: Sequence[Item], generate: Generate, settings: Sweep) -> list[SweepRow]:
    """Put a task to a model under each setting.

    Raises:
        BadInput: a record lacks what a metric reads.
    """
    asked = items[: settings.most_items]
    rewards = parse_rewards(task.metrics, None, where="metrics")
    deciding = task.correct or rewards.parts[0].reward.name
    within = next(part.reward for part in rewards.parts if part.reward.name == deciding)
    shares = {"distinct-1", "distinct-2", "self-BLEU"} | (
        {"score"} if 0 <= within.low <= within.high <= 1 else set()
    )
    found = []
    for setting in settings.settings:
        writing = Writing(
            task.max_new_tokens, settings.samples, setting.temperature, task.stop, task.chat, task.seed,
            setting.top_p, setting.top_k,
        )  # fmt: skip
        written = generate([item.prompt for item in asked], writing)
        samples = [
            Sample(item.prompt, one.text, item.record, n_tokens=len(one.logprob_N), finished=one.finished)
            for item, ones in zip(asked, written, strict=True)
            for one in ones
        ]
        scores = np.asarray(rewards.scored(samples).parts[deciding]).reshape(len(asked), -1).mean(1)
        texts = [[one.text for one in ones] for ones in written]
        values = {
            "score": scores.tolist(),
            "distinct-1": [distinct(own, 1) for own in texts],
            "distinct-2": [distinct(own, 2) for own in texts],
            "self-BLEU": [self_bleu(own) for own in texts],
        }
        groups = [item.group for item in asked]
        figures = {}
        for name, per_item in values.items():
            figure = Figure.of(name, "total", per_item, groups, is_share=name in shares)
            figures[name] = {"value": figure.value, "low": figure.low, "high": figure.high}
        found.append(SweepRow(task.name, setting.label, deciding, figures, len(asked)))
    return found
