"""Guarantees from held-out answers: sets that hold the right choice, and thresholds for abstaining.

    choice_threshold        sets of choices: the right one is in them in at least 1 - a of cases
    controlled_threshold    any loss that falls as a threshold rises: expected loss at most a
    guarantee               "of the answers given without a person, at most 5% are wrong, with 95% confidence"

The first two hold on average over calibration sets; the third holds for the threshold at hand, but for a
chance of 1 - confidence that the calibration set was unlucky. It tests, from strict candidates to lower ones,
whether the share of wrong answers among those given can still be above the limit:

    H_t: P(wrong | confidence >= t) > risk     p_t = P(Binomial(n_t, risk) <= errors_t)

and stops at the first that it cannot refute (fixed sequence testing; Bauer 1991). The p-values are exact, so
the promise holds for any number of answers; with too few, nothing can be promised, and the error says how
many are needed. Candidates must come from other answers than those that are tested (`candidates`). The
sequence begins at several of them, each with its share of the allowed chance, since the strictest ones have
too few answers to refute anything.

What is assumed: answers are drawn like those that will be asked, and independently: of a group (answers about
one document) only one is counted (`one_per_group`). A naive threshold, the lowest one whose share of errors
on the calibration set is within the limit, breaks its promise in about 44% of cases; the tests show both.

Sources: Vovk et al. 2005, Romano et al. 2020 (conformal sets); Angelopoulos et al. 2022, arXiv:2208.02814
(risk control); Angelopoulos et al. 2021, arXiv:2110.01052 (Learn then Test).

Shape legend: N answers, C choices, K candidates.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field, ValidationError
from scipy.stats import binom

from gyrocompass.core.config import Config
from gyrocompass.core.errors import BadInput
from gyrocompass.measure.calibration_metrics import judged, wilson

STARTS = 5
CANDIDATES = 50


# --- on average ---


def choice_threshold(true_probability_N: ArrayLike, alpha: float) -> float:
    """The least probability that a choice needs to be in the set; 0 where all must be.

        t = the floor(alpha (n + 1))-th least probability of the right choice

    Then P(right choice in {c: p_c >= t}) >= 1 - alpha for the next question, over draws of both.

    Args:
        true_probability_N: what the model gave to the right choice of each calibration question.
        alpha: how often the set may miss it.
    """
    p_N = np.sort(np.asarray(true_probability_N, np.float64))
    place = math.floor(alpha * (len(p_N) + 1))
    return float(p_N[place - 1]) if place >= 1 else 0.0


def choice_sets(probability_NC: ArrayLike, threshold: float) -> NDArray[np.bool_]:
    """Which choices are in the set of each question, [N, C]; the most probable one always is."""
    p_NC = np.asarray(probability_NC, np.float64)
    inside_NC: NDArray[np.bool_] = p_NC >= threshold
    inside_NC[np.arange(len(p_NC)), p_NC.argmax(1)] = True
    return inside_NC


def controlled_threshold(
    loss_KN: ArrayLike, thresholds_K: Sequence[float], alpha: float, highest_loss: float = 1.0
) -> float:
    """The lowest threshold whose expected loss is at most alpha (conformal risk control).

        t = min {t: n / (n + 1) * mean loss(t) + highest_loss / (n + 1) <= alpha}

    Args:
        loss_KN: of each answer at each threshold; it never rises from one threshold to the next.
        thresholds_K: rising.
        alpha: what the loss of the next answer may be, on average over draws of all.
        highest_loss: that an answer can have.

    Raises:
        BadInput: losses rise, or no threshold is enough.
    """
    loss = np.asarray(loss_KN, np.float64)
    if (np.diff(loss, axis=0) > 1e-12).any():
        raise BadInput("a loss rises with the threshold", fix="control a loss that falls as thresholds rise")
    count = loss.shape[1]
    bound_K = loss.sum(1) / (count + 1) + highest_loss / (count + 1)
    good = np.flatnonzero(bound_K <= alpha)
    if not len(good):
        raise BadInput(
            f"with {count} answers no threshold has a loss of at most {alpha}",
            fix=f"give at least {math.ceil(highest_loss / alpha) - 1} answers, or allow more",
        )
    return float(thresholds_K[good[0]])


# --- for the threshold at hand ---


class AbstentionThreshold(Config):
    """From which confidence on answers are given, in one slice, and what was seen there."""

    threshold: float
    answers: int = Field(ge=1)
    """That it was tested on."""
    given: int = Field(ge=1)
    wrong: int = Field(ge=0)
    """Of the given ones."""
    coverage: float
    coverage_low: float
    coverage_high: float
    """Share of answers that will be given without a person, with a 95% interval."""

    @property
    def review_share(self) -> float:
        """Share that people will be asked about."""
        return 1 - self.coverage


class Guarantee(Config):
    """What is promised, and the threshold of each slice that keeps the promise.

    A slice without one (`refused`) is never answered without a person.
    """

    risk: float = Field(gt=0, lt=1)
    """Of the answers given, at most this share is wrong ..."""
    confidence: float = Field(gt=0, lt=1)
    """... with this confidence, in each slice; in all of them at once if `joint`."""
    joint: bool = False
    thresholds: Mapping[str, AbstentionThreshold]
    refused: Mapping[str, str]
    """Slices for which nothing can be promised, and why."""

    def threshold(self, slice_name: str) -> float:
        """From which confidence on an answer of this slice is given; infinite where never."""
        found = self.thresholds.get(slice_name)
        return math.inf if found is None else found.threshold


def labels_needed(risk: float, confidence: float, starts: int = STARTS) -> int:
    """How many given answers without a single error are needed to promise anything.

        (1 - risk)^n <= (1 - confidence) / starts

    >>> labels_needed(0.05, 0.95, starts=1), labels_needed(0.05, 0.95)
    (59, 90)
    """
    return math.ceil(math.log((1 - confidence) / starts) / math.log1p(-risk))


def candidates(confidence_N: ArrayLike, most: int = CANDIDATES) -> list[float]:
    """Thresholds to try, falling: quantiles of the confidences of *other* answers, and 0."""
    confidence = np.asarray(confidence_N, np.float64)
    found = np.unique(np.quantile(confidence, np.arange(1, most) / most))
    return [*found[::-1].tolist(), *([] if found[0] == 0 else [0.0])]


def one_per_group(groups: Sequence[str]) -> NDArray[np.int64]:
    """The place of one answer of each group, which one the hash of its place decides."""
    best: dict[str, tuple[bytes, int]] = {}
    for place, group in enumerate(groups):
        draw = hashlib.sha256(f"{group} {place}".encode()).digest()
        if group not in best or draw < best[group][0]:
            best[group] = (draw, place)
    return np.sort(np.array([place for _, place in best.values()], np.int64))


def abstention_threshold(
    confidence_N: ArrayLike,
    correct_N: ArrayLike,
    tried: Sequence[float],
    risk: float,
    confidence: float,
    starts: int = STARTS,
) -> AbstentionThreshold:
    """The lowest threshold for which the share of wrong answers is shown to be at most `risk`.

    Args:
        confidence_N: of independent answers, none of which the candidates or the calibrator were made from.
        correct_N: 1 or 0.
        tried: candidates, falling.
        risk: the share of wrong answers that is allowed.
        confidence: of the promise.
        starts: how many candidates the sequence begins at, evenly spread, the lowest among them.

    Raises:
        BadInput: there are too few answers to promise anything, or too many of them are wrong.
    """
    given_confidence, correct = judged(confidence_N, correct_N)
    needed = labels_needed(risk, confidence, starts)
    if len(given_confidence) < needed:
        raise BadInput(
            f"{len(given_confidence)} answers are too few to promise at most {risk:.1%} wrong with "
            f"{confidence:.0%} confidence",
            fix=f"label at least {needed} answers, and more if any of them is wrong; or promise less",
        )
    allowed = (1 - confidence) / starts
    found: AbstentionThreshold | None = None
    ends = np.unique(np.ceil(len(tried) * np.arange(1, starts + 1) / starts).astype(int)) - 1
    for start in ends.tolist():
        for threshold in tried[start:]:
            given_N = given_confidence >= threshold
            given, wrong = int(given_N.sum()), int((1 - correct[given_N]).sum())
            if given == 0 or float(binom.cdf(wrong, given, risk)) > allowed:
                break
            if found is None or threshold < found.threshold:
                total = len(given_confidence)
                low, high = wilson(given, total)
                found = AbstentionThreshold(
                    threshold=threshold, answers=total, given=given, wrong=wrong,
                    coverage=given / total, coverage_low=low, coverage_high=high,
                )  # fmt: skip
    if found is None:
        raise BadInput(
            f"no threshold keeps the share of wrong answers within {risk:.1%}, as far as {len(correct)} "
            f"answers show: {1 - correct.mean():.1%} of all are wrong",
            fix="label more answers, improve the confidence, or promise less",
        )
    return found


def guarantee(
    confidence_N: ArrayLike,
    correct_N: ArrayLike,
    slices: Sequence[str],
    groups: Sequence[str],
    tried: Mapping[str, Sequence[float]],
    risk: float,
    confidence: float,
    *,
    joint: bool = False,
) -> Guarantee:
    """A threshold for each slice.

    Args:
        confidence_N: as for `abstention_threshold`, of all slices.
        correct_N: 1 or 0.
        slices: of each answer.
        groups: of each answer; one of each counts.
        tried: candidates of each slice.
        risk: of each slice.
        confidence: of the promise for a slice.
        joint: promise it of all slices at once: each has its share of the allowed chance (Bonferroni).

    Raises:
        BadInput: nothing can be promised for any slice.
    """
    confidences, correct = judged(confidence_N, correct_N)
    kept = one_per_group([f"{name} {group}" for name, group in zip(slices, groups, strict=True)])
    names = sorted(set(slices))
    each = 1 - (1 - confidence) / len(names) if joint else confidence
    found: dict[str, AbstentionThreshold] = {}
    refused: dict[str, str] = {}
    for name in names:
        own = [place for place in kept.tolist() if slices[place] == name]
        try:
            found[name] = abstention_threshold(confidences[own], correct[own], tried[name], risk, each)
        except BadInput as error:
            refused[name] = f"{error.what}; {error.fix}"
    if not found:
        first = next(iter(refused))
        raise BadInput(
            f"nothing can be promised for any of {len(names)} slices; {first}: {refused[first]}",
            fix="label more answers, or promise less",
        )
    return Guarantee(risk=risk, confidence=confidence, joint=joint, thresholds=found, refused=refused)


def naive_threshold(confidence_N: ArrayLike, correct_N: ArrayLike, risk: float) -> float | None:
    """The lowest threshold whose share of errors *here* is within the limit: what not to do.

    It picks among many thresholds the one that luck favoured. For contrast only.
    """
    confidence, correct = judged(confidence_N, correct_N)
    order = np.argsort(-confidence, kind="stable")
    share_N = np.cumsum(1 - correct[order]) / np.arange(1, len(order) + 1)
    good = np.flatnonzero(share_N <= risk)
    return float(confidence[order[good[-1]]]) if len(good) else None


def save_guarantee(promise: Guarantee, path: Path) -> None:
    """Write it as JSON."""
    path.write_text(promise.model_dump_json(indent=1), encoding="utf-8")


def load_guarantee(path: Path) -> Guarantee:
    """Read what `save_guarantee` wrote.

    Raises:
        BadInput: it is not there, or is something else.
    """
    try:
        return Guarantee.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        what = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error.strerror
        raise BadInput(f"no guarantee: {what}", where=path, fix="make one with `gyro calibrate`") from error
