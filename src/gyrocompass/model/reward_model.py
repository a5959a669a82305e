"""A reward model: a causal LM with a scalar head, and how honest the head's numbers are.

    reward of a document = scalar head at its last position / temperature

The temperature is fitted on held-out pairs when the model is saved, and stands in `reward_model.json` in its
folder with what was measured, so that it goes wherever the model goes and has a hash in its manifest. A model
without the file has the temperature 1.

    sigmoid(reward(y_1) - reward(y_2)) = probability that y_1 is preferred, as far as it is calibrated

Left out: temperatures that differ from slice to slice.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveFloat, ValidationError
from torch import nn

from gyrocompass.core.config import Config
from gyrocompass.core.errors import BadInput
from gyrocompass.data.tokens import TokenDataset
from gyrocompass.model.columns import score_rewards

FILE = "reward_model.json"


class RewardCalibration(Config):
    """What held-out pairs say of a reward model."""

    temperature: PositiveFloat
    """What its numbers are divided by; fitted on half of the pairs' groups."""
    ece_before: float = Field(ge=0, le=1)
    """Expected calibration error of the head's own numbers, on the other half."""
    ece_after: float = Field(ge=0, le=1)
    """The same at the temperature."""
    calibration_pairs: int = Field(ge=1)
    """Pairs that the errors were measured on."""
    accuracy: float = Field(ge=0, le=1)
    """Share of all held-out pairs whose chosen side it prefers."""
    accuracy_low: float | None
    accuracy_high: float | None
    """The 95% interval, clustered by group; None with a single group."""
    pairs: int = Field(ge=1)
    """Held-out pairs."""


class RewardModel(NamedTuple):
    """A model with a scalar head, ready to judge."""

    model: nn.Module
    calibration: RewardCalibration | None

    @property
    def temperature(self) -> float:
        """What the head's numbers are divided by."""
        return 1.0 if self.calibration is None else self.calibration.temperature

    def rewards(
        self, dataset: TokenDataset, length: int, rows: int, *, autocast: bool = False
    ) -> NDArray[np.float64]:
        """The calibrated reward of each document, [D]; arguments as for `columns.score_tokens`."""
        return score_rewards(self.model, length, rows, dataset, autocast=autocast) / self.temperature


def save_calibration(calibration: RewardCalibration, folder: Path) -> None:
    """Write it beside the model's weights."""
    (folder / FILE).write_text(calibration.model_dump_json(indent=1), encoding="utf-8")


def load_calibration(folder: Path) -> RewardCalibration | None:
    """What stands beside a model's weights, if anything does.

    Raises:
        BadInput: it cannot be read.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        return RewardCalibration.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise BadInput(
            f"the reward model's calibration cannot be read: {error.errors()[0]['msg']}",
            where=path,
            fix="train the reward model again, or delete the file to do without a temperature",
        ) from error


def copy_calibration(folder: Path, target: Path) -> None:
    """Let a copy of a model's weights have the calibration of the original, if that has one."""
    if (folder / FILE).is_file():
        shutil.copy(folder / FILE, target / FILE)
