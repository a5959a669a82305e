"""How far confidences are from the truth: calibration errors, scores, and what abstaining would buy.

    confidence_N in [0, 1], correct_N in {0, 1} --bins--> what a reliability diagram shows
                                                --calibration_error--> ECE, its null distribution, an interval
                                                --brier, log_loss, auroc, risk_coverage--> scores

The expected calibration error is biased: it adds up absolute values, so noise never cancels. A perfectly
calibrated model has an ECE of about 0.064 over 300 answers in 15 bins (0.112 over 100, 0.036 over 1,000; a
little more or less, as its confidences lie). So an ECE is never told alone here: beside it stands what a
perfect model with the same confidences would get over as many answers (`null_mean`), what is left without
that (`debiased`), and how often a perfect model would look as bad (`p_value`).

All functions take what is about the same kind of thing: tokens, sequences, answers or choices; by slice is a
matter of the caller's selection (`by_slice`). Groups are what was drawn as one (answers about one document);
intervals are over groups.

Left out: kernel estimates of calibration error, whose bandwidth is one more thing to argue about.

Sources: Naeini et al. 2015 (ECE); Broecker and Smith 2007 (consistency resampling, the null distribution);
Murphy 1973 (decomposition of the Brier score); Kull et al. 2019 (classwise); Geifman and El-Yaniv 2017
(AURC).

Shape legend: N answers, B bins, G groups, R resamples, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gyrocompass.core.errors import BadInput

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
Kind = Literal["width", "mass"]

BINS = 15
RESAMPLES = 1000
Z_95 = 1.959963984540054

T = TypeVar("T")


class Judged(NamedTuple):
    """Confidences with what came of them, checked once for all functions below."""

    confidence_N: FloatArray
    correct_N: FloatArray
    """1.0 or 0.0."""


class Bin(NamedTuple):
    """A bar of a reliability diagram."""

    low: float
    high: float
    """Its confidences: those between quantiles are told by the least and the greatest in it."""
    size: int
    confidence: float
    """The mean of its confidences."""
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    """Wilson's 95% interval of the accuracy."""


class CalibrationError(NamedTuple):
    """An ECE with what is needed to read it."""

    value: float
    low: float
    high: float
    """95% interval of the debiased error, by resampling groups; see `calibration_error`."""
    debiased: float
    """sqrt(value^2 - null_mean^2), 0 at least."""
    null_mean: float
    """What a perfect model with these confidences gets on average."""
    null_95: float
    """What it exceeds in 5% of cases."""
    p_value: float
    """How often it gets `value` or more."""
    answers: int


class Brier(NamedTuple):
    """The Brier score and its parts: score = reliability - resolution + uncertainty + within."""

    score: float
    reliability: float
    """Of bins: squared distance of confidence and accuracy; 0 is best."""
    resolution: float
    """Squared distance of the bins' accuracies from that of all; more is better."""
    uncertainty: float
    """Of the question itself: p (1 - p) of all."""
    within: float
    """What binning hides: 0 where all confidences of a bin are equal."""


class RiskCoverage(NamedTuple):
    """What is wrong among the answers that are given when the least confident are held back."""

    coverage_K: FloatArray
    """Share of answers given, rising, one entry for each distinct confidence."""
    risk_K: FloatArray
    """Share of them that is wrong."""
    threshold_K: FloatArray
    """Answers with at least this confidence are given."""
    area: float
    """AURC: the mean risk over all coverages 1/N .. 1; ties count as in random order."""
    excess_area: float
    """AURC less that of a perfect ranking with as many errors."""


def judged(confidence_N: ArrayLike, correct_N: ArrayLike) -> Judged:
    """Check confidences and what came of them.

    Raises:
        BadInput: nothing is there; lengths differ; a confidence is outside [0, 1]; an outcome is graded.
    """
    confidence, correct = np.asarray(confidence_N, np.float64), np.asarray(correct_N, np.float64)
    if confidence.shape != correct.shape or confidence.ndim != 1:
        raise BadInput(
            f"{confidence.shape} confidences and {correct.shape} outcomes do not fit together",
            fix="give one outcome, right or wrong, for each confidence",
        )
    if not len(confidence):
        raise BadInput(
            "there is nothing to calibrate on", fix="give answers that are known to be right or wrong"
        )
    wrong = np.flatnonzero(~((confidence >= 0) & (confidence <= 1)))
    if len(wrong):
        raise BadInput(
            f"a confidence is {confidence[wrong[0]]}, not a number from 0 to 1",
            where=f"answer {wrong[0]} ({len(wrong)} of {len(confidence)} are so)",
            fix="look where it comes from; a NaN there is a fault of the model or of the score",
        )
    if not np.isin(correct, (0.0, 1.0)).all():
        raise BadInput("outcomes are right or wrong: 1 or 0", fix="set a threshold for graded ones")
    return Judged(confidence, correct)


# --- reliability ---


def bins(
    confidence_N: ArrayLike, correct_N: ArrayLike, n_bins: int = BINS, kind: Kind = "width"
) -> list[Bin]:
    """Bars of a reliability diagram, those without answers left out.

    Args:
        confidence_N: in [0, 1].
        correct_N: 1 or 0.
        n_bins: at most so many.
        kind: `width`: [0, 1/B], (1/B, 2/B], ...; `mass`: as many answers in each, equal confidences together.

    >>> [(bar.size, bar.accuracy) for bar in bins([0.1, 0.2, 0.9, 0.9], [0, 0, 1, 0], n_bins=2)]
    [(2, 0.0), (2, 0.5)]
    """
    confidence, correct = judged(confidence_N, correct_N)
    bin_N = _bin_of(confidence, n_bins, kind)
    found = []
    for number in np.unique(bin_N):
        inside = bin_N == number
        size = int(inside.sum())
        right = float(correct[inside].sum())
        low, high = wilson(right, size)
        edge_low, edge_high = (
            (number / n_bins, (number + 1) / n_bins)
            if kind == "width"
            else (confidence[inside].min(), confidence[inside].max())
        )
        found.append(
            Bin(
                low=float(edge_low),
                high=float(edge_high),
                size=size,
                confidence=float(confidence[inside].mean()),
                accuracy=right / size,
                accuracy_low=low,
                accuracy_high=high,
            )
        )
    return found


def wilson(right: float, count: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share (Wilson 1927).

    >>> [round(end, 3) for end in wilson(8, 10)]
    [0.49, 0.943]
    """
    share, z2 = right / count, Z_95**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    reach = Z_95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    # The share is in it, whatever rounding says.
    return max(0.0, min(share, middle - reach)), min(1.0, max(share, middle + reach))


def expected_calibration_error(
    confidence_N: ArrayLike, correct_N: ArrayLike, n_bins: int = BINS, kind: Kind = "width"
) -> float:
    """ECE = sum_b n_b / N * |accuracy_b - confidence_b|.

    Biased upwards: see the module docstring, and `calibration_error` for what to tell beside it.
    """
    confidence, correct = judged(confidence_N, correct_N)
    return float(_errors(_bin_of(confidence, n_bins, kind), n_bins, confidence, correct[None])[0])


def classwise_error(probability_NC: ArrayLike, label_N: ArrayLike, n_bins: int = BINS) -> float:
    """The mean over classes of the ECE of that class's probability (Kull et al. 2019, eq. 3).

    Args:
        probability_NC: of each class.
        label_N: the class that was true.
        n_bins: of equal width.
    """
    probability = np.asarray(probability_NC, np.float64)
    label = np.asarray(label_N)
    errors = [
        expected_calibration_error(probability[:, c], label == c, n_bins) for c in range(probability.shape[1])
    ]
    return float(np.mean(errors))


def calibration_error(
    confidence_N: ArrayLike,
    correct_N: ArrayLike,
    groups: Sequence[str] | None = None,
    n_bins: int = BINS,
    kind: Kind = "width",
    seed: int = 0,
) -> CalibrationError:
    """The ECE, what a perfect model would get, and an interval.

        null:      outcomes drawn anew, each right with the probability that its confidence says
        debiased:  sqrt(max(0, ECE^2 - m^2)), m the mean of the null: noise and error add in squares, so
                   that little is taken off where the error is large
        interval:  95% of the same, of ECEs of resampled groups, moved so that their mean is ECE: their spread
                   is used and not their level, which resampling raises once more

    Args:
        confidence_N: in [0, 1].
        correct_N: 1 or 0.
        groups: what was drawn as one with others; None: each answer by itself.
        n_bins: at most so many.
        kind: as for `bins`.
        seed: of the null and of the resampling.
    """
    confidence, correct = judged(confidence_N, correct_N)
    bin_N = _bin_of(confidence, n_bins, kind)
    generator = np.random.default_rng(seed)
    value = float(_errors(bin_N, n_bins, confidence, correct[None])[0])
    null_R = np.concatenate(
        [
            _errors(
                bin_N,
                n_bins,
                confidence,
                (generator.random((part, len(confidence))) < confidence).astype(float),
            )
            for part in _parts(RESAMPLES, len(confidence))
        ]
    )
    own_R = _resampled_errors(bin_N, n_bins, confidence, correct, groups, generator)
    null_mean = float(null_R.mean())
    moved_R = np.maximum(own_R - own_R.mean() + value, 0.0)
    low, high = np.quantile(moved_R, [0.025, 0.975])
    low, debiased, high = np.sqrt(np.maximum(0.0, np.array([low, value, high]) ** 2 - null_mean**2)).tolist()
    return CalibrationError(
        value=value,
        low=low,
        high=high,
        debiased=debiased,
        null_mean=null_mean,
        null_95=float(np.quantile(null_R, 0.95)),
        p_value=(1 + int((null_R >= value).sum())) / (1 + RESAMPLES),
        answers=len(confidence),
    )


def _bin_of(confidence_N: FloatArray, n_bins: int, kind: Kind) -> IntArray:
    """The bin of each answer; bins are closed above, and the first one below too."""
    if kind == "width":
        found = np.ceil(confidence_N * n_bins).astype(np.int64) - 1
        return np.clip(found, 0, n_bins - 1)
    # Ranks among distinct values, so that equal confidences stay together.
    _, place_N, count = np.unique(confidence_N, return_inverse=True, return_counts=True)
    middle = np.cumsum(count) - (count + 1) / 2
    bin_of_value = np.minimum((middle * n_bins / len(confidence_N)).astype(np.int64), n_bins - 1)
    found_N: IntArray = bin_of_value[place_N]
    return found_N


def _errors(bin_N: IntArray, n_bins: int, confidence_N: FloatArray, correct_RN: FloatArray) -> FloatArray:
    """The ECE of each row of outcomes, [R]: sum over bins of |sum of confidence - sum of correct| / N."""
    is_in_NB = np.zeros((len(bin_N), n_bins))
    is_in_NB[np.arange(len(bin_N)), bin_N] = 1.0
    gap_RB = correct_RN @ is_in_NB - confidence_N @ is_in_NB
    error_R: FloatArray = np.abs(gap_RB).sum(1) / len(bin_N)
    return error_R


def _resampled_errors(
    bin_N: IntArray,
    n_bins: int,
    confidence_N: FloatArray,
    correct_N: FloatArray,
    groups: Sequence[str] | None,
    generator: np.random.Generator,
) -> FloatArray:
    """ECEs of as many groups, drawn with replacement: sums by group, weighed by how often it is drawn."""
    group_N = (
        np.arange(len(bin_N)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    )
    n_groups = int(group_N.max()) + 1
    gap_GB, size_G = np.zeros((n_groups, n_bins)), np.bincount(group_N, minlength=n_groups).astype(np.float64)
    np.add.at(gap_GB, (group_N, bin_N), correct_N - confidence_N)
    drawn_RG = generator.multinomial(n_groups, np.full(n_groups, 1 / n_groups), RESAMPLES).astype(np.float64)
    error_R: FloatArray = np.abs(drawn_RG @ gap_GB).sum(1) / (drawn_RG @ size_G)
    return error_R


def _parts(rows: int, columns: int) -> list[int]:
    """Rows in parts of about 16 MiB of float64."""
    most = max(1, 2**21 // max(columns, 1))
    return [min(most, rows - start) for start in range(0, rows, most)]


# --- scores ---


def brier(confidence_N: ArrayLike, correct_N: ArrayLike, n_bins: int = BINS) -> Brier:
    """mean (confidence - correct)^2 with Murphy's decomposition over bins of equal width.

        reliability = sum_b n_b / N (c_b - a_b)^2      resolution = sum_b n_b / N (a_b - a)^2
        uncertainty = a (1 - a)                        within     = what is left

    c_b and a_b: mean confidence and accuracy of a bin; a: accuracy of all.
    """
    confidence, correct = judged(confidence_N, correct_N)
    score = float(np.mean((confidence - correct) ** 2))
    bars = bins(confidence, correct, n_bins)
    total, accuracy = len(confidence), float(correct.mean())
    reliability = sum(bar.size * (bar.confidence - bar.accuracy) ** 2 for bar in bars) / total
    resolution = sum(bar.size * (bar.accuracy - accuracy) ** 2 for bar in bars) / total
    uncertainty = accuracy * (1 - accuracy)
    return Brier(
        score, reliability, resolution, uncertainty, score - (reliability - resolution + uncertainty)
    )


def log_loss(confidence_N: ArrayLike, correct_N: ArrayLike) -> float:
    """-mean log of the probability that was given to what came, nats; infinite where that was 0."""
    confidence, correct = judged(confidence_N, correct_N)
    given = np.where(correct == 1, confidence, 1 - confidence)
    with np.errstate(divide="ignore"):
        return float(-np.log(given).mean())


def auroc(confidence_N: ArrayLike, correct_N: ArrayLike) -> float | None:
    """The chance that a right answer has more confidence than a wrong one, ties half; None for one class.

    >>> auroc([0.9, 0.8, 0.3], [1, 0, 0])
    1.0
    """
    confidence, correct = judged(confidence_N, correct_N)
    right = int(correct.sum())
    if right in (0, len(correct)):
        return None
    _, place_N, count = np.unique(confidence, return_inverse=True, return_counts=True)
    rank_N = (np.cumsum(count) - (count - 1) / 2)[place_N]
    above = float(rank_N[correct == 1].sum()) - right * (right + 1) / 2
    return above / (right * (len(correct) - right))


def risk_coverage(confidence_N: ArrayLike, correct_N: ArrayLike) -> RiskCoverage:
    """How the share of wrong answers falls when only the more confident are given.

    >>> curve = risk_coverage([0.9, 0.5, 0.4, 0.1], [1, 1, 0, 1])
    >>> curve.coverage_K.tolist(), curve.risk_K.round(2).tolist()
    ([0.25, 0.5, 0.75, 1.0], [0.0, 0.0, 0.33, 0.25])
    """
    confidence, correct = judged(confidence_N, correct_N)
    values, place_N = np.unique(-confidence, return_inverse=True)
    count_K = np.bincount(place_N)
    wrong_K = np.bincount(place_N, 1 - correct)
    given_K, errors_K = np.cumsum(count_K), np.cumsum(wrong_K)
    total, errors = len(confidence), int((1 - correct).sum())
    # Within ties, the expected number of errors among the first j grows evenly.
    each = np.arange(1, total + 1)
    expected = np.interp(each, np.concatenate([[0], given_K]), np.concatenate([[0.0], errors_K]))
    area = float(np.mean(expected / each))
    best = float(np.mean(np.maximum(0, each - (total - errors)) / each))
    return RiskCoverage(given_K / total, errors_K / given_K, -values, area, area - best)


def by_slice(measure: Callable[[IntArray], T], slices: Sequence[str]) -> Mapping[str, T]:
    """A measure of the answers of each slice, by their places, and of all under `total`."""
    names = np.asarray(slices)
    found = {str(name): measure(np.flatnonzero(names == name)) for name in sorted(set(slices))}
    return {**found, "total": measure(np.arange(len(names)))}
