"""Tests that may be looked at after every answer: the error never grows with the looks.

    differences as they come --Betting------> e-value: wealth against "the mean is 0"; p = 1 / highest wealth;
                                              an interval at every time, right at all times at once
                             --one_sided_p_values--> the same against "the mean is at most 0"
                         --MixtureTest--> mSPRT: the same for means of many, by a normal approximation

A test of fixed size that is looked at a hundred times finds a difference where there is none in 37% of cases
instead of 5%. Here the wealth of somebody who bets on a difference is a martingale if there is none, so it
ever exceeds 1 / level with a chance of at most `level` (Ville 1939), whenever one looks and stops.

Betting needs no assumption but bounds: what is observed lies in [-1, 1] (the difference of two outcomes in
[0, 1], one from each arm: a right answer, a thumb, a share), and its mean given the past is 0 under the null
hypothesis. MixtureTest is for what has no bounds (latency, nats), takes its variance from the data and is
exact only for large counts; it begins at `least`.

Sources: Waudby-Smith and Ramdas 2023 (betting); Robbins 1970, Johari et al. 2022 (mSPRT); Ville 1939.

Shape legend: N observations, R repetitions side by side, M means of a grid, L bets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gyrocompass.core.errors import BadInput

FloatArray = NDArray[np.float64]
GRID = 201
"""Means that a confidence sequence tries, from -1 to 1."""
BETS = np.geomspace(0.01, 0.5, 16)
"""Shares that are bet, each by one of many gamblers with the same money: the best decides in the end."""


class Verdict(NamedTuple):
    """What is known so far."""

    p_value: float
    """Right at any time: 1 over the highest wealth so far, 1 at most."""
    e_value: float
    """The wealth now."""
    mean: float
    low: float
    high: float
    """A confidence sequence: with 95% confidence the mean has been in all of them."""
    observations: int


class Betting:
    """An always-valid test of "the mean difference is 0", one observation after the other.

    Args:
        level: of the confidence sequence.

    >>> test = Betting()
    >>> for _ in range(40):
    ...     test.observe(1.0)
    >>> test.verdict().p_value < 0.05, test.verdict().low > 0
    (True, True)
    """

    def __init__(self, level: float = 0.05) -> None:
        self.level = level
        self.count, self.sum = 0, 0.0
        self.highest = 1.0
        self.mean_M = np.linspace(-1, 1, GRID)
        self.inside_M = np.ones(GRID, np.bool_)
        # No observation in [-1, 1] may lose more than half: a mean of m leaves room for 1 + m below.
        self.up_ML = np.minimum(BETS, 0.5 / (1 + self.mean_M[:, None] + 1e-9))
        self.down_ML = np.minimum(BETS, 0.5 / (1 - self.mean_M[:, None] + 1e-9))
        self.log_up_ML, self.log_down_ML = np.zeros_like(self.up_ML), np.zeros_like(self.down_ML)

    def observe(self, difference: float) -> None:
        """Take up the next difference, in [-1, 1].

        Raises:
            BadInput: it is outside.
        """
        if not -1 <= difference <= 1:
            raise BadInput(
                f"a difference of {difference} is not in [-1, 1]",
                fix="compare outcomes from 0 to 1, or use the mixture test",
            )
        gap_M1 = (difference - self.mean_M)[:, None]
        self.log_up_ML += np.log1p(self.up_ML * gap_M1)
        self.log_down_ML += np.log1p(-self.down_ML * gap_M1)
        wealth_M = self._wealth()
        self.inside_M &= wealth_M < 1 / self.level
        self.count += 1
        self.sum += difference
        self.highest = max(self.highest, float(wealth_M[GRID // 2]))

    def _wealth(self) -> FloatArray:
        """Half is bet on the mean being greater, half on it being less, [M]."""
        both = np.concatenate([self.log_up_ML, self.log_down_ML], 1)
        wealth_M: FloatArray = np.exp(np.logaddexp.reduce(both, 1)) / both.shape[1]
        return wealth_M

    def verdict(self) -> Verdict:
        """What is known so far; before the first observation, nothing."""
        inside = self.mean_M[self.inside_M]
        mean = self.sum / self.count if self.count else 0.0
        step = 2 / (GRID - 1)
        low, high = (float(inside[0]) - step, float(inside[-1]) + step) if len(inside) else (mean, mean)
        return Verdict(
            p_value=min(1.0, 1 / self.highest),
            e_value=float(self._wealth()[GRID // 2]),
            mean=mean,
            low=max(-1.0, low),
            high=min(1.0, high),
            observations=self.count,
        )

    def state(self) -> dict[str, Any]:
        """As JSON, to go on from."""
        return {
            "level": self.level,
            "count": self.count,
            "sum": self.sum,
            "highest": self.highest,
            "inside": self.inside_M.tolist(),
            "log_up": self.log_up_ML.tolist(),
            "log_down": self.log_down_ML.tolist(),
        }

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> Betting:
        """From what `state` returned."""
        test = cls(state["level"])
        test.count, test.sum, test.highest = state["count"], state["sum"], state["highest"]
        test.inside_M = np.array(state["inside"], np.bool_)
        test.log_up_ML, test.log_down_ML = np.array(state["log_up"]), np.array(state["log_down"])
        return test


def betting_p_values(difference_RN: ArrayLike) -> FloatArray:
    """The p-value at every time of many tests side by side, [R, N]; as `Betting`, for simulations.

    Args:
        difference_RN: in [-1, 1].
    """
    difference = np.asarray(difference_RN, np.float64)
    found = np.full(difference.shape, -np.inf)
    for bet in [*BETS, *-BETS]:
        np.logaddexp(found, np.cumsum(np.log1p(bet * difference), 1), out=found)
    found -= math.log(2 * len(BETS))
    p_RN: FloatArray = np.exp(-np.maximum(0, np.maximum.accumulate(found, 1)))
    return p_RN


class MixtureTest(NamedTuple):
    """The mixture sequential probability ratio test of "the mean is 0", with variance from the data.

    Under the null hypothesis the mean is 0; against it stands a mixture of means ~ N(0, tau^2):

        L_n = sqrt(v / (v + n tau^2)) * exp(n^2 tau^2 m^2 / (2 v (v + n tau^2)))      m: mean, v: variance

    p_n = min(1, 1 / max_(k <= n) L_k), from `least` observations on.
    """

    tau: float
    """The size of differences that it is best at, in the unit of the observations."""
    least: int = 100

    def p_values(self, value_RN: ArrayLike) -> FloatArray:
        """The p-value at every time, [R, N]; 1 before `least`."""
        value = np.atleast_2d(np.asarray(value_RN, np.float64))
        n = np.arange(1, value.shape[1] + 1, dtype=np.float64)
        mean = np.cumsum(value, 1) / n
        variance = np.maximum(np.cumsum(value**2, 1) / n - mean**2, 1e-300) * n / np.maximum(n - 1, 1)
        spread = variance + n * self.tau**2
        log_ratio = 0.5 * np.log(variance / spread) + (n * self.tau * mean) ** 2 / (2 * variance * spread)
        log_ratio[:, : self.least - 1] = 0.0
        p_RN: FloatArray = np.exp(-np.maximum(0, np.maximum.accumulate(log_ratio, 1)))
        return p_RN

    def half_width(self, variance: float, count: int, level: float = 0.05) -> float:
        """Of the confidence sequence around the mean of `count` observations; infinite before `least`."""
        if count < self.least:
            return math.inf
        spread = variance + count * self.tau**2
        evidence = math.log(1 / level) + 0.5 * math.log(spread / variance)
        return math.sqrt(2 * variance * spread * evidence) / (count * self.tau)


def one_sided_p_values(value_N: ArrayLike) -> FloatArray:
    """The p-value of "the mean, given the past, is at most 0" at every time, [N]; always valid.

    Somebody bets on the mean being greater, with each share of `BETS` a part of the money:
    p_n = min(1, 1 / max_(k <= n) of the mean over b of prod_(i <= k) (1 + b x_i)).

    Args:
        value_N: in [-1, 1].

    >>> float(one_sided_p_values([0.5] * 40)[-1]) < 0.01, float(one_sided_p_values([-0.5] * 40)[-1])
    (True, 1.0)
    """
    value = np.asarray(value_N, np.float64)
    wealth_LN = np.cumsum(np.log1p(BETS[:, None] * value), 1)
    log_wealth = np.logaddexp.reduce(wealth_LN, 0) - math.log(len(BETS))
    p_N: FloatArray = np.exp(-np.maximum(0, np.maximum.accumulate(log_wealth)))
    return p_N
