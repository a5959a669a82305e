"""What alignment is judged by: preferences of held-out pairs, and rewards of samples, each with its interval.

    margins of pairs   --pair_figures-----> accuracy; for a reward model its calibration too
    values of samples  --sample_figure----> mean per prompt, clustered by the group of the prompt
    two models         --paired_difference> the difference on the same groups

The margin of a pair is what speaks for the chosen answer: the difference of log-probabilities, of their
ratios to a reference (the reward that DPO is implicitly about), or of a reward model's numbers. It is right
if it is above 0; a tie is half right.

Expected calibration error of a reward model: with p = sigmoid(margin / temperature), confidence
max(p, 1 - p), and B = 10 bins of equal width on [1/2, 1],

    ECE = sum_b n_b / n * |right share of b - mean confidence of b|

It is above 0 for a perfect model too, the more so the fewer pairs. The temperature is fitted on one half of
the groups and the error measured on the other. A group's place is its hash, and the halves are what is before
and behind a place: with that place, a temperature that was fitted earlier is not measured on the same groups.

Sources: Guo et al. 2017, arXiv:1706.04599 (temperature, ECE); Platt 1999, "Probabilistic outputs for support
vector machines" (targets short of 1).

Shape legend: P pairs or samples, G groups.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gyrocompass.measure.intervals import Estimate, ratio_estimate, share_estimate

FloatArray = NDArray[np.float64]
ALIGNMENT = "alignment.json"
"""Where a stage keeps its figures."""
PREFERRED = "preferred by "
BY_LOGPROB, BY_RATIO, BY_REWARD = (
    PREFERRED + what for what in ("log-probability", "ratio to reference", "reward model")
)
CUT_OFF, DISTANCE = "sample: cut off", "sample: KL from reference, nats"
BINS = 10


class Figure(NamedTuple):
    """One measure of one model, as JSON keeps it."""

    name: str
    slice: str
    value: float
    low: float | None
    high: float | None
    size: int
    """Pairs or samples."""
    groups: int
    """What the interval is clustered by."""
    by_group: dict[str, tuple[float, int]]
    """Each group's sum and count: what two models are compared by."""
    is_share: bool = False
    """Whether every value is in [0, 1], so that the interval is too."""

    @classmethod
    def of(
        cls, name: str, slice_name: str, values_P: ArrayLike, groups: Sequence[str], *, is_share: bool = False
    ) -> Figure:
        """The mean of values, clustered by group."""
        sums: dict[str, tuple[float, int]] = {}
        for value, group in zip(np.asarray(values_P, np.float64).tolist(), groups, strict=True):
            total, count = sums.get(group, (0.0, 0))
            sums[group] = (total + value, count + 1)
        sum_G, count_G = np.array(list(sums.values()), np.float64).T
        estimate = (share_estimate if is_share else ratio_estimate)(sum_G, count_G)
        return cls(name, slice_name, *estimate, len(groups), len(sums), sums, is_share)


def right_share(margin_P: ArrayLike) -> FloatArray:
    """1 where the margin is above 0, 1/2 where it is 0.

    >>> right_share([2.0, 0.0, -1.0]).tolist()
    [1.0, 0.5, 0.0]
    """
    right_P: FloatArray = (np.sign(np.asarray(margin_P, np.float64)) + 1) / 2
    return right_P


def paired_difference(one: Figure, other: Figure) -> Estimate | None:
    """How much `one` is above `other`, on the groups that both have; None where they share none.

    The groups are the clusters, so what a group has in common under both models cancels. Where two shares are
    equal in every group, the interval is what so many equal groups leave open, as in `share_estimate`.
    """
    shared = [group for group in one.by_group if group in other.by_group]
    if not shared:
        return None
    counts_G = np.array([one.by_group[group][1] for group in shared], np.float64)
    means = [np.array([f.by_group[g][0] / f.by_group[g][1] for g in shared]) for f in (one, other)]
    change = ratio_estimate((means[0] - means[1]) * counts_G, counts_G)
    if one.is_share and other.is_share and np.array_equal(means[0], means[1]):
        open_ = share_estimate(np.zeros(len(shared)), counts_G).high
        return change if open_ is None else Estimate(0.0, -open_, open_)
    return change


class Calibration(NamedTuple):
    """How honest a reward model's confidence is, on groups that the temperature was not fitted on."""

    temperature: float
    ece_before: float
    ece_after: float
    pairs: int


def calibration(
    margin_P: ArrayLike,
    groups: Sequence[str],
    temperature: float | None = None,
    split: float | None = None,
) -> Calibration | None:
    """Fit a temperature on half of the groups and measure on the other; None where a half is empty.

    Args:
        margin_P: the chosen side's reward less that of the rejected one.
        groups: of each pair.
        temperature: one that was fitted before, to be measured instead.
        split: the place of the first group to measure on; None: in the middle of these.
    """
    margin_P = np.asarray(margin_P, np.float64)
    measured_P = places(groups) >= (middle(groups) if split is None else split)
    if not measured_P.any() or (temperature is None and measured_P.all()):
        return None
    if temperature is None:
        temperature = fit_temperature(margin_P[~measured_P])
    other_P = margin_P[measured_P]
    return Calibration(
        temperature,
        expected_calibration_error(other_P),
        expected_calibration_error(other_P / temperature),
        len(other_P),
    )


def places(groups: Sequence[str]) -> FloatArray:
    """Where the group of each pair stands, [P], from 0 to 1: by its hash, so always at the same place."""
    digests = (hashlib.sha256(group.encode()).digest()[:8] for group in groups)
    return np.array([int.from_bytes(digest) / 2.0**64 for digest in digests], np.float64)


def middle(groups: Sequence[str]) -> float:
    """The place that has half of the groups before it; with a single one, none.

    >>> places(["a", "b", "c"]).round(2).tolist(), round(middle(["a", "b", "b", "c"]), 2)
    ([0.79, 0.24, 0.18], 0.24)
    """
    place_G = np.unique(places(groups))
    return float(place_G[len(place_G) // 2])


def fit_temperature(margin_P: FloatArray) -> float:
    """The temperature with the least negative log-likelihood, from 1/100 to 100.

        argmin_tau mean [t log(1 + exp(-margin / tau)) + (1 - t) log(1 + exp(margin / tau))],  t = (P+1)/(P+2)

    A target short of 1 by what P pairs can tell keeps the temperature off its bound where all of them are
    right.
    """
    from scipy.optimize import minimize_scalar  # imported here: scipy takes a while

    def nll(log_temperature: float) -> float:
        scaled_P = margin_P / np.exp(log_temperature)
        return float((np.logaddexp(0.0, -scaled_P) + (1 - target) * scaled_P).mean())

    target = (len(margin_P) + 1) / (len(margin_P) + 2)
    bounds = (np.log(0.01), np.log(100.0))
    return float(np.exp(minimize_scalar(nll, bounds=bounds, method="bounded").x))


def expected_calibration_error(margin_P: FloatArray) -> float:
    """ECE of sigmoid(margin), as in the module docstring.

    >>> expected_calibration_error(np.array([100.0, 100.0, 100.0, -100.0]))
    0.25
    """
    confidence_P = 1 / (1 + np.exp(-np.abs(margin_P)))
    bin_P = np.minimum(((confidence_P - 0.5) * 2 * BINS).astype(int), BINS - 1)
    gap = 0.0
    for number in np.unique(bin_P):
        own = bin_P == number
        gap += own.mean() * abs(right_share(margin_P[own]).mean() - confidence_P[own].mean())
    return float(gap)


def figures_from(rows: Sequence[dict[str, Any]]) -> list[Figure]:
    """Figures as JSON kept them."""
    return [
        Figure(**{**row, "by_group": {g: (s, n) for g, (s, n) in row["by_group"].items()}}) for row in rows
    ]
