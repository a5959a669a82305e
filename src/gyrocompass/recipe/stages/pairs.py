"""Held-out pairs: which of two answers a model prefers, and how honest a reward model's numbers are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gyrocompass.core.errors import BadInput
from gyrocompass.data.tokens import TokenDataset
from gyrocompass.measure.alignment import Figure, calibration, middle, right_share
from gyrocompass.measure.reward_calibration import RewardCalibration

Float64Array = NDArray[np.float64]


def open_pairs(folder: Path, where: str) -> TokenDataset:
    """Tokens of preferences.

    Raises:
        BadInput: they are tokens of something else.
    """
    data = TokenDataset.open(folder)
    if "side" not in data.labels or not np.isin(data.labels["side"], (0, 1)).all():
        raise BadInput(
            "these tokens are not pairs of a chosen and a rejected answer",
            where=where,
            fix="give tokens of preferences",
        )
    return data


def margins(data: TokenDataset, score_D: Float64Array) -> Float64Array:
    """Of each pair, the score of the chosen side less that of the rejected one, [P]."""
    side_D = data.labels["side"]
    chosen_P, rejected_P = np.flatnonzero(side_D == 1), np.flatnonzero(side_D == 0)
    assert np.array_equal(data.unit_D[chosen_P], data.unit_D[rejected_P]), "pairs stand side by side"
    margin_P: Float64Array = score_D[chosen_P] - score_D[rejected_P]
    return margin_P


def groups_of(data: TokenDataset) -> list[str]:
    """The group of each pair."""
    chosen_D: Any = data.labels["side"] == 1
    return [group for group, chosen in zip(data.groups, chosen_D, strict=True) if chosen]


def check_halves(data: TokenDataset, where: str) -> None:
    """Refuse pairs that a temperature cannot both be fitted and measured on, before any training.

    Raises:
        BadInput: they are of one group.
    """
    groups = set(groups_of(data))
    if len(groups) < 2:
        raise BadInput(
            f"the held-out pairs are of {len(groups)} document: a temperature is fitted on those of one half "
            "of the documents and measured on the other",
            where=where,
            fix="hold out pairs of more documents, or leave held_out_pairs out",
        )


def calibrated(data: TokenDataset, reward_D: Float64Array) -> RewardCalibration:
    """What held-out pairs say of a reward model's numbers, as the head gives them, [D].

    The pairs have passed `check_halves`.
    """
    margin_P, groups = margins(data, reward_D), groups_of(data)
    found = calibration(margin_P, groups)
    assert found is not None, "both halves have a pair"
    right = Figure.of("right", "total", right_share(margin_P), groups)
    return RewardCalibration(
        temperature=found.temperature,
        split=middle(groups),
        ece_before=found.ece_before,
        ece_after=found.ece_after,
        calibration_pairs=found.pairs,
        accuracy=right.value,
        accuracy_low=right.low,
        accuracy_high=right.high,
        pairs=right.size,
    )
