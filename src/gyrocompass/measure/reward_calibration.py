"""How honest a reward model's numbers are, in a file that goes wherever the model goes.

    held-out pairs --fitted and measured (`alignment.calibration`)--> RewardCalibration --> reward_model.json

The file stands beside the model's weights, so it has a hash in the manifest of the model's artifact.

Left out: temperatures that differ from slice to slice.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from pydantic import Field, PositiveFloat, ValidationError

from gyrocompass.core.config import Config
from gyrocompass.core.errors import BadInput

FILE = "reward_model.json"


class RewardCalibration(Config):
    """What held-out pairs say of a reward model."""

    temperature: PositiveFloat
    """What its numbers are divided by; fitted on half of the pairs' groups."""
    split: float = Field(ge=0, le=1)
    """Where the other half of the groups begins, as `alignment.places` places them."""
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
