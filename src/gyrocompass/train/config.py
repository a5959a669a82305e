"""How a training run is configured: how long, on what, by which objective."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from gyrocompass.core.config import Config, MistakesBelow
from gyrocompass.core.errors import ConfigError
from gyrocompass.data.curriculum import CurriculumConfig
from gyrocompass.data.mixture import SamplerConfig
from gyrocompass.loss.blend import BlendConfig
from gyrocompass.loss.objective import Composite, parse_objectives
from gyrocompass.loss.reduce import Reduction
from gyrocompass.train.guard import GuardConfig
from gyrocompass.train.optim import OptimizerConfig
from gyrocompass.train.reference import ReferenceUpdateConfig
from gyrocompass.train.scheduled_sampling import ScheduledSamplingConfig
from gyrocompass.train.stopping import EarlyStoppingConfig

PRECISIONS = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "bf16_autocast": torch.float32,
}
"""The dtype of the model's weights for each precision."""


class TrainConfig(Config):
    """How long, on what, by which objective; exactly one of `steps` and `epochs` says when it is over.

    A step reads `rows_per_step` packed rows of `sequence_length` tokens of data, and beside them or instead
    the samples of its rollouts, as many as these say; `rows_per_micro_batch` rows are in memory at once on
    each rank, which changes nothing but memory and speed.
    """

    steps: int | None = Field(default=None, ge=1)
    epochs: int | None = Field(default=None, ge=1)
    sequence_length: int = Field(default=512, ge=2)
    rows_per_step: int = Field(default=32, ge=1)
    rows_per_micro_batch: int = Field(default=8, ge=1)
    slice_weights: dict[str, NonNegativeFloat] | None = None
    slice_temperature: PositiveFloat = 1.0
    """Above 1 small slices are read more often than their weights say: shares in proportion to p^(1/T)."""
    slice_most_repeats: PositiveFloat | None = None
    """How often a slice is read at most in the whole run; what is over goes to the other slices."""
    curriculum: CurriculumConfig | None = None
    objective: tuple[str | dict[str, Any], ...] = ("nll",)
    blend: BlendConfig | None = None
    """How the weights of objectives and slices adapt to what the run measures; None: they do not."""
    scheduled_sampling: ScheduledSamplingConfig | None = None
    """Let the model read some tokens of its own; NLLs of training are then under those, and the metrics have
    the teacher-forced ones beside them."""
    reference_update: ReferenceUpdateConfig | None = None
    """How a live reference follows the policy (TR-DPO); None: it stays where it is."""
    reduction: Reduction = Reduction()
    optimizer: OptimizerConfig = OptimizerConfig()
    precision: Literal["float64", "float32", "bf16", "bf16_autocast"] = "float32"
    activation_checkpointing: bool = False
    checkpoint_every_steps: int = Field(default=100, ge=1)
    checkpoints_kept: int = Field(default=2, ge=1)
    evaluate_every_steps: int | None = Field(default=None, ge=1)
    early_stopping: EarlyStoppingConfig | None = None
    guard: GuardConfig = GuardConfig()
    seed: int = Field(default=0, ge=0)

    def sampler(self) -> SamplerConfig:
        """The part that decides which rows each step reads."""
        return SamplerConfig(
            length=self.sequence_length,
            rows_per_step=self.rows_per_step,
            slice_weights=self.slice_weights,
            temperature=self.slice_temperature,
            most_repeats=self.slice_most_repeats,
            tokens=self.steps and self.steps * self.rows_per_step * self.sequence_length,
            curriculum=self.curriculum,
            epochs=self.epochs,
            seed=self.seed,
        )

    def _check_constraint(self, objective: Composite) -> None:
        """What a multiplier multiplies is more than 0."""
        constrained = self.blend and self.blend.lagrangian and self.blend.lagrangian.objective
        for number, part in enumerate(objective.parts):
            if part.name == constrained and part.weight == 0:
                said = "its weight is 0, and so is 0 times the multiplier: leave the weight out"
                raise MistakesBelow([(("objective", str(number)), said)])

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs")
        if self.slice_most_repeats is not None and self.curriculum and self.curriculum.slices:
            raise ValueError("slice_most_repeats and curriculum.slices both move weights: choose one")
        if self.early_stopping and not self.evaluate_every_steps:
            raise ValueError("early_stopping needs evaluate_every_steps")
        try:
            objective = parse_objectives(self.objective, "objective")
            if self.blend is not None:
                self.blend.adapted(objective.names)
                self._check_constraint(objective)
        except ConfigError as error:
            raise placed(error) from error
        if self.blend and self.blend.doremi and self.reduction.by not in ("token", "constant"):
            raise ValueError("blend.doremi weighs tokens by slice: reduction.by has to be token or constant")
        return self


def placed(error: ConfigError) -> MistakesBelow:
    """The mistakes of a list within a config, of objectives or rewards, at the keys they stand at."""
    at = tuple(error.where.split(".")) if error.where else ()
    fix = f"\n  fix: {error.fix}" if error.fix else ""
    return MistakesBelow(error.mistakes or [(at, error.what + fix)])
