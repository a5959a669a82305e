"""A reward model: a causal LM with a scalar head, and how honest the head's numbers are.

    reward of a document = scalar head at its last position / temperature

    sigmoid(reward(y_1) - reward(y_2)) = probability that y_1 is preferred, as far as it is calibrated

The temperature is fitted on held-out pairs when the model is saved, and stands in a file beside its weights
(`measure.reward_calibration`). A model without the file has the temperature 1.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import nn

from gyrocompass.data.tokens import TokenDataset
from gyrocompass.measure.reward_calibration import RewardCalibration
from gyrocompass.model.columns import score_rewards


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
