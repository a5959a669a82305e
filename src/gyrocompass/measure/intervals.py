"""What a ledger's sums say: nats per token, perplexity and bits per byte, each with an interval.

The unit that is sampled is the group: a file with everything derived from it (its docstrings, its question
and answer pairs), which a split holds out as one. Neither the tokens nor the documents of a group are
independent. A slice's figure is a ratio of two sums over its G groups,

    R = sum_g x_g / sum_g y_g          x_g: NLL of group g;  y_g: its tokens (or its bytes)

and its variance is that of the linearised ratio, with groups as clusters:

    e_g = x_g - R y_g
    var(R) = G / (G - 1) * sum_g e_g^2 / (sum_g y_g)^2
    R +- t(G - 1 degrees of freedom) * sqrt(var(R))

A ledger that does not say the groups is clustered by document, each a group of its own.

The interval speaks about groups like these, from which these were drawn at random. It says nothing about
documents of another kind, nor about retraining the model. From one group no interval can be had: it is None,
never a made-up one. With few groups of unequal length the linearisation is a little optimistic (simulated
with log-normal lengths, 3 to 40 groups: it covers 92 to 94% where it says 95%), so the count of groups is
always printed beside it.

Left out on purpose: the bootstrap, which says the same at a thousand times the cost for a ratio of sums.

Source: W. G. Cochran, Sampling Techniques, 3rd edition, 1977, sections 2.11 and 6.4.

Shape legend: G groups, R rows of a ledger.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from gyrocompass.measure.ledger import FIELDS, Dimension, FloatArray, Ledger

CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A figure and its interval; no interval (None) where one group is all there is."""

    value: float
    low: float | None
    high: float | None


def ratio_estimate(
    numerator_G: ArrayLike, denominator_G: ArrayLike, confidence: float = CONFIDENCE
) -> Estimate:
    """A ratio of sums over groups with its t interval, clustered by group.

        R = sum_g x_g / sum_g y_g,  R +- t * sqrt(G/(G-1) * sum_g (x_g - R y_g)^2) / sum_g y_g

    Args:
        numerator_G: x_g, one per group.
        denominator_G: y_g >= 0, at least one above 0.
        confidence: of the two-sided interval.

    >>> ratio_estimate([2.0, 4.0], [1.0, 2.0])
    Estimate(value=2.0, low=2.0, high=2.0)
    >>> ratio_estimate([2.0], [1.0])
    Estimate(value=2.0, low=None, high=None)
    """
    x_G, y_G = np.asarray(numerator_G, dtype=np.float64), np.asarray(denominator_G, dtype=np.float64)
    denominator = float(y_G.sum())
    assert denominator > 0, "a ratio over nothing"
    ratio = float(x_G.sum()) / denominator
    groups = len(x_G)
    if groups < 2:
        return Estimate(ratio, None, None)
    residual_G = x_G - ratio * y_G
    standard_error = math.sqrt(groups / (groups - 1) * float(residual_G @ residual_G)) / denominator
    half_width = _t_quantile(0.5 + confidence / 2, groups - 1) * standard_error
    return Estimate(ratio, ratio - half_width, ratio + half_width)


def share_estimate(
    numerator_G: ArrayLike, denominator_G: ArrayLike, confidence: float = CONFIDENCE
) -> Estimate:
    """A mean of values in [0, 1] over groups: as `ratio_estimate`, with an interval that stays inside [0, 1].

    Where all values are 0, or all are 1, the groups show no spread, and "0 of 20" is no proof of "never". The
    interval is then that of Clopper and Pearson for G independent trials, each a group:

        [0, 1 - (a / 2)^(1/G)],  or [(a / 2)^(1/G), 1],  a = 1 - confidence

    A mean of m needs at least a share m of the groups (counted by their sizes) to be above 0. So where groups
    are of about one size the bound holds for values between 0 and 1 too, however many values a group has.

    >>> low, high = share_estimate([0.0] * 20, [3.0] * 20)[1:]
    >>> low, round(high, 3)
    (0.0, 0.168)

    Source: Clopper and Pearson, Biometrika 26, 1934.
    """
    value, low, high = ratio_estimate(numerator_G, denominator_G, confidence)
    if low is None or high is None:
        return Estimate(value, low, high)
    reach = ((1 - confidence) / 2) ** (1 / np.asarray(numerator_G).size)
    if value == 0.0:
        return Estimate(0.0, 0.0, 1 - reach)
    if value == 1.0:
        return Estimate(1.0, reach, 1.0)
    return Estimate(value, max(0.0, low), min(1.0, high))


class SliceScore(NamedTuple):
    """A slice's line in a report. Intervals are 95%, clustered by group; None where there is none."""

    slice: str
    documents: int
    groups: int
    """Clusters that the intervals stand on; as many as documents where the ledger does not say the groups."""
    tokens: int
    bytes: int
    nats_per_token: float
    nats_per_token_low: float | None
    nats_per_token_high: float | None
    perplexity: float
    perplexity_low: float | None
    perplexity_high: float | None
    bits_per_byte: float | None
    """None where the tokens stand for no bytes."""
    bits_per_byte_low: float | None
    bits_per_byte_high: float | None
    top1: float | None
    """Share of tokens that no other token scored above; None where ranks were not measured."""


def slice_scores(ledger: Ledger) -> list[SliceScore]:
    """One line per slice of an evaluation's ledger, then the line `total`.

    The ledger must have been kept by slice and by document, and by group for intervals that hold where
    several documents were drawn as one; a slice without counted tokens has no line.
    The total is over all tokens, so slices weigh in it as their tokens do.
    """
    scores = [_score(name, ledger, name) for name in ledger.names("slice")]
    return [*scores, _score("total", ledger, None)] if ledger.names("document") else scores


def clusters(ledger: Ledger) -> Dimension:
    """What intervals are clustered by: `group`, or `document` where some tokens' groups are not known."""
    grouped = int(ledger.columns("group")[1][:, FIELDS.index("count")].sum())
    return "group" if grouped == ledger.total.count else "document"


def _score(name: str, ledger: Ledger, within_slice: str | None) -> SliceScore:
    sums_GF: FloatArray = ledger.columns(clusters(ledger), within_slice)[1]
    column = {field: sums_GF[:, index] for index, field in enumerate(FIELDS)}
    n_bytes, ranked = int(column["bytes"].sum()), float(column["top1_count"].sum())
    nats = _not_negative(ratio_estimate(column["value"], column["count"]))
    bits = _not_negative(ratio_estimate(column["value"] / math.log(2), column["bytes"])) if n_bytes else None
    return SliceScore(
        slice=name,
        documents=len(ledger.columns("document", within_slice)[0]),
        groups=len(sums_GF),
        tokens=int(column["count"].sum()),
        bytes=n_bytes,
        nats_per_token=nats.value,
        nats_per_token_low=nats.low,
        nats_per_token_high=nats.high,
        perplexity=_exp(nats.value),
        perplexity_low=None if nats.low is None else _exp(nats.low),
        perplexity_high=None if nats.high is None else _exp(nats.high),
        bits_per_byte=bits.value if bits else None,
        bits_per_byte_low=bits.low if bits else None,
        bits_per_byte_high=bits.high if bits else None,
        top1=float(column["top1"].sum()) / ranked if ranked else None,
    )


def _not_negative(estimate: Estimate) -> Estimate:
    """NLL is never negative, so the interval is cut where the parameter cannot be."""
    return estimate if estimate.low is None else estimate._replace(low=max(0.0, estimate.low))


def _exp(nats: float) -> float:
    """exp, infinite where it overflows (above 709 nats)."""
    return math.exp(nats) if nats < 709.0 else math.inf


def _t_quantile(probability: float, degrees_of_freedom: int) -> float:
    from scipy.special import stdtrit  # imported here: scipy takes a while

    return float(stdtrit(degrees_of_freedom, probability))
