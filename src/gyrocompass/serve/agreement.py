"""How far people agree, and how often answers that nobody looked at are wrong.

kappa                 of those who looked at the same items
error of auto-answers from the share that was drawn for a look, weighed by the chance of being drawn
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from gyrocompass.measure.intervals import Estimate


def kappa(pairs: Sequence[tuple[Hashable, Hashable]], confidence: float = 0.95) -> Estimate:
    """Cohen's kappa of two raters.

        kappa = (p_o - p_e) / (1 - p_e)
        p_o: share of items on which both say the same; p_e = sum over c of p_first(c) p_second(c)

    The interval is the normal one with the large-sample variance of Fleiss, Cohen and Everitt (1969), cut to
    [-1, 1]; None below 2 items, or where both always say one same thing (p_e = 1, kappa is not defined).

    >>> pairs = [("yes", "yes")] * 20 + [("yes", "no")] * 5 + [("no", "yes")] * 10 + [("no", "no")] * 15
    >>> round(kappa(pairs).value, 6)
    0.4
    """
    if not pairs:
        return Estimate(float("nan"), None, None)
    names = sorted({one for pair in pairs for one in pair}, key=repr)
    place = {name: number for number, name in enumerate(names)}
    p_CC = np.zeros((len(names), len(names)))
    for first, second in pairs:
        p_CC[place[first], place[second]] += 1 / len(pairs)
    first_C, second_C = p_CC.sum(1), p_CC.sum(0)
    observed, expected = float(np.trace(p_CC)), float(first_C @ second_C)
    if expected >= 1 - 1e-12:
        return Estimate(1.0, None, None)
    value = (observed - expected) / (1 - expected)
    if len(pairs) < 2:
        return Estimate(value, None, None)
    diagonal = np.diag(p_CC)
    a = float((diagonal * (1 - (first_C + second_C) * (1 - value)) ** 2).sum())
    sums_CC = second_C[:, None] + first_C[None, :]
    outside = p_CC * sums_CC**2
    b = float((1 - value) ** 2 * (outside.sum() - np.trace(outside)))
    c = (value - expected * (1 - value)) ** 2
    spread = float(np.sqrt(max(0.0, a + b - c) / len(pairs)) / (1 - expected))
    reach = float(stats.norm.ppf(0.5 + confidence / 2)) * spread
    return Estimate(value, max(-1.0, value - reach), min(1.0, value + reach))


class Looked(NamedTuple):
    """An answer that was given by itself, and drawn for a look."""

    wrong: bool
    inclusion: float
    """The probability with which it was drawn."""


def error_rate(looked: Sequence[Looked], confidence: float = 0.95) -> Estimate:
    """The share of wrong ones among all answers that could have been drawn (Hajek's estimator).

        r = sum(wrong_i / pi_i) / sum(1 / pi_i)

    Items are drawn independently (Poisson sampling), so with e_i = (wrong_i - r) / pi_i

        var(r) = sum(e_i^2 (1 - pi_i)) / (sum 1 / pi_i)^2 + r (1 - r) / (sum 1 / pi_i)

    the first term being the draw's, the second that of the answers themselves. The interval is Clopper and
    Pearson's for x = n r of n = r (1 - r) / var(r) answers, the number that would say as much if each counted
    the same (Korn and Graubard, Survey Methodology 24, 1998); where all or none are wrong,
    n = (sum 1 / pi_i)^2 / sum 1 / pi_i^2. None below 2 answers.

    >>> error_rate([Looked(True, 0.5), Looked(False, 0.1), Looked(False, 0.1)]).value
    0.09090909090909091
    """
    if not looked:
        return Estimate(float("nan"), None, None)
    wrong_N = np.array([one.wrong for one in looked], np.float64)
    pi_N = np.array([one.inclusion for one in looked], np.float64)
    weight_N = 1 / pi_N
    total = float(weight_N.sum())
    value = float((wrong_N * weight_N).sum()) / total
    if len(looked) < 2:
        return Estimate(value, None, None)
    if value in (0.0, 1.0):
        n = total**2 / float((weight_N**2).sum())
    else:
        draw = float((((wrong_N - value) * weight_N) ** 2 * (1 - pi_N)).sum()) / total**2
        n = value * (1 - value) / (draw + value * (1 - value) / total)
    tail, x = (1 - confidence) / 2, n * value
    low = float(stats.beta.ppf(tail, x, n - x + 1)) if value > 0 else 0.0
    high = float(stats.beta.ppf(1 - tail, x + 1, n - x)) if value < 1 else 1.0
    return Estimate(value, low, high)
