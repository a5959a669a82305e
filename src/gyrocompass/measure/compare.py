"""Which of two is better: paired differences with intervals, corrections, and how much data it takes.

    the same documents under two models --paired--> difference, interval, p-value, by slice and metric
    many comparisons --holm, benjamini_hochberg--> which of them hold together
    a metric that must not get worse --not_inferior--> whether that is shown, by a margin
    a measure from before --cuped--> the same difference with less noise
    what difference should be seen --sample_size--> how many

What is compared is a ratio of sums over groups (nats over tokens, right over asked), as everywhere in
`measure`: groups are what was drawn as one, both models see the same, so differences are paired. A figure is

    d = sum_g (a_g - b_g) / sum_g n_g          a_g, b_g: sums of a group under each model;  n_g: its weight

Bootstrap: groups are drawn with replacement, n times. Permutation: under the null hypothesis the models are
exchangeable within each group, so signs are flipped; its p-value is exact up to the number of flips.

Sources: Efron and Tibshirani 1993; Good 2005; Holm 1979; Benjamini and Hochberg 1995; Deng et al. 2013
(CUPED); Phipson and Smyth 2010 (p-values of flips are never 0).

Shape legend: G groups, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gyrocompass.core.errors import BadInput
from gyrocompass.measure.intervals import clusters
from gyrocompass.measure.ledger import FIELDS, Ledger

FloatArray = NDArray[np.float64]
RESAMPLES = 5000
COUNT, VALUE = FIELDS.index("count"), FIELDS.index("value")
METRIC = "nats per token"
CONFIDENCE = 0.95


class Paired(NamedTuple):
    """One figure under two models: a minus b."""

    difference: float
    low: float
    high: float
    """Interval by bootstrap over groups."""
    p_value: float
    """Two-sided, by flipping signs of groups."""
    groups: int
    weight: float
    """What the sums are divided by: tokens, answers."""


def paired(
    a_G: ArrayLike,
    b_G: ArrayLike,
    weight_G: ArrayLike,
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Paired:
    """The difference of two models on the same groups.

    Args:
        a_G: sum of each group under the first model.
        b_G: under the second.
        weight_G: what they are divided by, the same under both, above 0.
        confidence: of the interval.
        resamples: of the bootstrap, and of the flips.
        seed: of both.

    Raises:
        BadInput: lengths differ, a value is not finite, or there are fewer than two groups.
    """
    gap_G, weights_G = _gaps(a_G, b_G, weight_G)
    generator = np.random.default_rng(seed)
    total = float(weights_G.sum())
    difference = float(gap_G.sum()) / total
    drawn_R = _bootstrap(gap_G, weights_G, resamples, generator)
    low, high = np.quantile(drawn_R, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Paired(
        difference, float(low), float(high), _flip_p(gap_G, resamples, generator), len(gap_G), total
    )


def _gaps(a_G: ArrayLike, b_G: ArrayLike, weight_G: ArrayLike) -> tuple[FloatArray, FloatArray]:
    a, b, weight = (np.asarray(values, np.float64) for values in (a_G, b_G, weight_G))
    if not a.shape == b.shape == weight.shape:
        raise BadInput(
            f"{len(a)}, {len(b)} and {len(weight)} groups are not the same groups",
            fix="score both models on the same documents",
        )
    if len(a) < 2:
        raise BadInput(
            "differences are judged by how they vary between groups, and there are not two",
            fix="score more documents",
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all() and (weight > 0).all()):
        raise BadInput("a sum is not finite, or a weight not above 0", fix="look for NaN in the scores")
    return a - b, weight


def _bootstrap(
    gap_G: FloatArray, weight_G: FloatArray, resamples: int, generator: np.random.Generator
) -> FloatArray:
    """Differences of as many groups, drawn with replacement, [R]."""
    count = len(gap_G)
    found = np.empty(resamples)
    step = max(1, 2**21 // count)
    for start in range(0, resamples, step):
        stop = min(start + step, resamples)
        drawn_RG = generator.multinomial(count, np.full(count, 1 / count), stop - start).astype(np.float64)
        found[start:stop] = (drawn_RG @ gap_G) / (drawn_RG @ weight_G)
    return found


def _flip_p(gap_G: FloatArray, resamples: int, generator: np.random.Generator) -> float:
    """How often flipped signs give as large a sum; the observed one counts among them."""
    observed = abs(float(gap_G.sum())) * (1 - 1e-12)
    count, step = 0, max(1, 2**21 // len(gap_G))
    for start in range(0, resamples, step):
        signs = generator.integers(0, 2, (min(step, resamples - start), len(gap_G))) * 2.0 - 1.0
        count += int((np.abs(signs @ gap_G) >= observed).sum())
    return (1 + count) / (1 + resamples)


# --- many comparisons ---


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p-values adjusted so that the chance of a single false alarm among all stays at the level (Holm).

    >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
    {'a': 0.03, 'b': 0.06, 'c': 0.06}
    """
    names = sorted(p_values, key=lambda name: p_values[name])
    found: dict[str, float] = {}
    highest = 0.0
    for place, name in enumerate(names):
        highest = max(highest, min(1.0, (len(names) - place) * p_values[name]))
        found[name] = highest
    return {name: found[name] for name in p_values}


def benjamini_hochberg(p_values: Mapping[str, float]) -> dict[str, float]:
    """p-values adjusted so that the expected share of false alarms among alarms stays at the level.

    >>> benjamini_hochberg({"a": 0.01, "b": 0.04, "c": 0.03})
    {'a': 0.03, 'b': 0.04, 'c': 0.04}
    """
    names = sorted(p_values, key=lambda name: -p_values[name])
    found: dict[str, float] = {}
    lowest = 1.0
    for place, name in enumerate(names):
        lowest = min(lowest, len(names) / (len(names) - place) * p_values[name])
        found[name] = lowest
    return {name: found[name] for name in p_values}


CORRECTIONS = {"holm": holm, "benjamini_hochberg": benjamini_hochberg}


# --- guardrails ---


class Guardrail(NamedTuple):
    """Whether a figure is shown to be no worse than before by more than a margin."""

    holds: bool
    worst: float
    """The end of the one-sided interval on the bad side: it is at most so much worse."""
    margin: float


def not_inferior(
    a_G: ArrayLike,
    b_G: ArrayLike,
    weight_G: ArrayLike,
    margin: float,
    *,
    lower_is_better: bool = True,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Guardrail:
    """Test H0: a is worse than b by `margin` or more, by a one-sided bootstrap interval.

    Too little data never passes: what is not shown does not hold.

    Args:
        a_G: the newcomer's sums, as for `paired`.
        b_G: those of what is in use.
        weight_G: what they are divided by.
        margin: how much worse is still borne, in the figure's unit, 0 or more.
        lower_is_better: as for nats; False for shares of right answers.
        confidence: of the interval.
        resamples: of the bootstrap.
        seed: of it.
    """
    gap_G, weights_G = _gaps(a_G, b_G, weight_G)
    worse_G = gap_G if lower_is_better else -gap_G
    drawn_R = _bootstrap(worse_G, weights_G, resamples, np.random.default_rng(seed))
    worst = float(np.quantile(drawn_R, confidence))
    return Guardrail(worst < margin, worst, margin)


# --- less noise, and how much data ---


class Cuped(NamedTuple):
    """Outcomes less what a measure from before says of them."""

    adjusted_N: FloatArray
    theta: float
    variance_left: float
    """Share of the variance that is left: 1 - correlation^2."""


def cuped(outcome_N: ArrayLike, before_N: ArrayLike) -> Cuped:
    """y - theta (x - mean x), theta = cov(x, y) / var(x): the same mean, less variance (CUPED).

    Args:
        outcome_N: what is compared.
        before_N: a measure of the same unit from before the treatment, which therefore cannot depend on it.

    Raises:
        BadInput: lengths differ.
    """
    y, x = np.asarray(outcome_N, np.float64), np.asarray(before_N, np.float64)
    if x.shape != y.shape:
        raise BadInput(f"{len(y)} outcomes and {len(x)} measures from before", fix="give one for each unit")
    variance = float(x.var())
    if variance == 0 or float(y.var()) == 0:
        return Cuped(y, 0.0, 1.0)
    theta = float(((x - x.mean()) * (y - y.mean())).mean()) / variance
    adjusted_N = y - theta * (x - x.mean())
    return Cuped(adjusted_N, theta, float(adjusted_N.var() / y.var()))


def sample_size(
    difference: float, deviation: float, *, power: float = 0.8, level: float = 0.05, paired: bool = False
) -> int:
    """Units per arm (pairs, if paired) to see a difference of means with this power, two-sided.

        n = (z_(1 - level / 2) + z_power)^2 * k * deviation^2 / difference^2       k: 2, or 1 for pairs

    Args:
        difference: the smallest that is worth seeing.
        deviation: of a unit, or of a pair's difference.
        power: the chance to see it.
        level: the chance to see one where there is none.
        paired: whether both arms see the same units.

    >>> sample_size(0.02, 0.5)
    9812
    """
    if difference == 0 or deviation <= 0:
        raise BadInput("no number of units shows a difference of 0", fix="say what is worth seeing")
    normal = NormalDist()
    z = normal.inv_cdf(1 - level / 2) + normal.inv_cdf(power)
    return math.ceil(z**2 * (1 if paired else 2) * deviation**2 / difference**2)


class Line(NamedTuple):
    """A comparison in a table."""

    metric: str
    slice: str
    result: Paired
    p_adjusted: float
    lower_is_better: bool | None
    """None: neither is better."""

    def verdict(self, level: float = 1 - CONFIDENCE) -> str:
        """`better` and `worse` are about the first model."""
        if self.p_adjusted > level or self.lower_is_better is None:
            return "no difference shown" if self.p_adjusted > level else "differs"
        return "better" if (self.result.difference < 0) == self.lower_is_better else "worse"


def lines(
    found: Mapping[tuple[str, str], Paired],
    lower_is_better: Mapping[str, bool | None],
    correction: str = "holm",
) -> list[Line]:
    """Comparisons by metric and slice, with p-values corrected over all of them.

    Args:
        found: by metric and slice.
        lower_is_better: by metric.
        correction: a name in `CORRECTIONS`.
    """
    names = {f"{metric}\0{part}": result.p_value for (metric, part), result in found.items()}
    adjusted = CORRECTIONS[correction](names)
    return [
        Line(metric, part, result, adjusted[f"{metric}\0{part}"], lower_is_better[metric])
        for (metric, part), result in found.items()
    ]


def aligned(
    a: Mapping[str, tuple[float, float]], b: Mapping[str, tuple[float, float]]
) -> tuple[FloatArray, FloatArray, FloatArray, Sequence[str]]:
    """Sums of two models by group, laid side by side: a_G, b_G, weight_G and the groups' names.

    Args:
        a: by group, the sum and the weight.
        b: the same of the other model.

    Raises:
        BadInput: they are not of the same groups, or weights differ, as tokens of two tokenizers do.
    """
    if a.keys() != b.keys():
        odd = sorted(a.keys() ^ b.keys())
        raise BadInput(
            f"the models were scored on other documents: {len(odd)} are not in both, such as {odd[0]}",
            fix="score both on the same data",
        )
    names = sorted(a)
    weight = np.array([a[name][1] for name in names], np.float64)
    if not np.array_equal(weight, [b[name][1] for name in names]):
        raise BadInput(
            "the two do not count the same in the same documents",
            fix="compare bits per byte, which do not depend on the tokenizer",
        )
    return (
        np.array([a[name][0] for name in names], np.float64),
        np.array([b[name][0] for name in names], np.float64),
        weight,
        names,
    )


# --- ledgers ---


def ledger_differences(pairs: Sequence[tuple[Ledger, Ledger]]) -> tuple[list[Line], dict[str, list[float]]]:
    """Paired differences by slice, summed over pairs of ledgers, and those of each pair alone."""
    slices = [*pairs[0][0].names("slice")]
    found: dict[tuple[str, str], Paired] = {}
    by_seed: dict[str, list[float]] = {}
    for name in [*slices, None]:
        sides: tuple[dict[str, tuple[float, float]], dict[str, tuple[float, float]]] = ({}, {})
        label = name or "total"
        by_seed[label] = []
        for ledgers in pairs:
            own = [group_sums(ledger, name) for ledger in ledgers]
            one_G, other_G, weight_G, _ = aligned(own[0], own[1])
            by_seed[label].append(float((one_G - other_G).sum() / weight_G.sum()))
            for side, sums in zip(sides, own, strict=True):
                for group, (value, weight) in sums.items():
                    before = side.get(group, (0.0, 0.0))
                    side[group] = (before[0] + value, before[1] + weight)
        one_G, other_G, weight_G, groups = aligned(*sides)
        if len(groups) > 1:
            found[METRIC, label] = paired(one_G, other_G, weight_G)
    if not found:
        raise BadInput("no slice has two groups of documents to compare on", fix="score more documents")
    return lines(found, {METRIC: True}), by_seed


def group_sums(ledger: Ledger, name: str | None) -> dict[str, tuple[float, float]]:
    """Loss and tokens of each group of documents of a slice; of all for None."""
    groups, sums_GF = ledger.columns(clusters(ledger), name)
    return {group: (float(row[VALUE]), float(row[COUNT])) for group, row in zip(groups, sums_GF, strict=True)}
