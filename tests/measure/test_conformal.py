"""Guarantees, by simulation with known truth: kept in at least the promised share of repetitions."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit

from gyrocompass.core.errors import BadInput
from gyrocompass.measure.conformal import (
    Guarantee,
    abstention_threshold,
    candidates,
    choice_sets,
    choice_threshold,
    controlled_threshold,
    guarantee,
    labels_needed,
    load_guarantee,
    naive_threshold,
    one_per_group,
    save_guarantee,
)

GRID = np.linspace(0, 1, 2001)
REPETITIONS = 1000


def drawn(
    generator: np.random.Generator, n: int, slope: float, offset: float
) -> tuple[np.ndarray, np.ndarray]:
    """Confidences, and answers that are right with another probability than they say."""
    confidence = generator.beta(3, 1, n)
    return confidence, (generator.random(n) < right_share(confidence, slope, offset)).astype(float)


def right_share(confidence: np.ndarray, slope: float, offset: float) -> np.ndarray:
    return expit(slope * (confidence - 0.5) + offset)


def true_risk(threshold: float, slope: float, offset: float) -> float:
    """P(wrong | confidence >= threshold), by numerical integration of the beta(3, 1) density 3 c^2."""
    at = np.linspace(threshold, 1, 4001)
    weight = 3 * at**2
    return float(np.trapezoid(weight * (1 - right_share(at, slope, offset)), at) / np.trapezoid(weight, at))


@pytest.mark.parametrize(
    ("n", "risk", "slope", "offset"), [(100, 0.1, 6.0, 1.0), (300, 0.1, 6.0, 1.0), (1000, 0.05, 8.0, 1.0)]
)
def test_the_promise_is_kept_and_the_naive_threshold_breaks_it(
    n: int, risk: float, slope: float, offset: float
) -> None:
    generator = np.random.default_rng(n)
    tried = candidates(generator.beta(3, 1, 500))
    broken, naive_broken, given_any = 0, 0, 0
    for _ in range(REPETITIONS):
        confidence, correct = drawn(generator, n, slope, offset)
        naive = naive_threshold(confidence, correct, risk)
        naive_broken += naive is not None and true_risk(naive, slope, offset) > risk
        try:
            found = abstention_threshold(confidence, correct, tried, risk, 0.95)
        except BadInput:
            continue
        given_any += 1
        broken += true_risk(found.threshold, slope, offset) > risk
    assert broken <= 0.05 * REPETITIONS
    assert naive_broken >= 0.35 * REPETITIONS
    assert n < 300 or given_any >= 0.5 * REPETITIONS, "a promise that is never made is kept too easily"


def test_every_slice_has_its_own_promise() -> None:
    """Four slices, one of them hopeless; a confidence that does not rank at all in another."""
    generator = np.random.default_rng(7)
    shapes = {"good": (8.0, 2.0), "fair": (6.0, 1.0), "flat": (0.0, 2.0), "bad": (1.0, -1.0)}
    tried = dict.fromkeys(shapes, candidates(generator.beta(3, 1, 500)))
    broken, broken_joint = dict.fromkeys(shapes, 0), 0
    repetitions = 300
    for _ in range(repetitions):
        parts = {name: drawn(generator, 200, *shape) for name, shape in shapes.items()}
        slices = [name for name in shapes for _ in range(200)]
        confidence = np.concatenate([part[0] for part in parts.values()])
        correct = np.concatenate([part[1] for part in parts.values()])
        groups = [str(n) for n in range(len(slices))]
        for joint in (False, True):
            try:
                found = guarantee(confidence, correct, slices, groups, tried, 0.1, 0.95, joint=joint)
            except BadInput:
                continue
            wrong = [
                name
                for name, one in found.thresholds.items()
                if true_risk(one.threshold, *shapes[name]) > 0.1
            ]
            if joint:
                broken_joint += bool(wrong)
            else:
                for name in wrong:
                    broken[name] += 1
            assert set(found.thresholds) | set(found.refused) == set(shapes)
    # 5% of 300 is 15; twice the deviation of such a count is 7.5.
    assert max(broken.values()) <= 22 and broken_joint <= 22


def test_coverage_is_what_comes_to_pass() -> None:
    generator = np.random.default_rng(8)
    confidence, correct = drawn(generator, 2000, 8.0, 1.5)
    found = abstention_threshold(confidence, correct, candidates(generator.beta(3, 1, 500)), 0.05, 0.95)
    later = generator.beta(3, 1, 100_000) >= found.threshold
    assert found.coverage_low - 0.01 <= later.mean() <= found.coverage_high + 0.01
    assert found.review_share == pytest.approx(1 - found.coverage)


def test_too_few_labels_say_how_many_are_needed() -> None:
    assert labels_needed(0.05, 0.95) == 90
    with pytest.raises(BadInput, match="50 answers are too few") as raised:
        abstention_threshold([0.9] * 50, [1] * 50, [0.5, 0.0], 0.05, 0.95)
    assert "label at least 90 answers" in str(raised.value)
    found = abstention_threshold([0.9] * 90, [1] * 90, [0.5, 0.0], 0.05, 0.95)
    assert found.threshold == 0.0 and found.given == 90 and found.wrong == 0


def test_a_hopeless_slice_is_refused_and_never_answered() -> None:
    confidence, slices = [0.9] * 200, ["good"] * 100 + ["bad"] * 100
    correct = [1.0] * 100 + [0.0] * 100
    tried = {"good": [0.5], "bad": [0.5]}
    found = guarantee(confidence, correct, slices, [str(n) for n in range(200)], tried, 0.1, 0.9)
    assert found.threshold("good") == 0.5 and found.threshold("bad") == math.inf
    assert "100.0% of all are wrong" in found.refused["bad"]
    assert found.threshold("never seen") == math.inf


def test_answers_about_one_document_count_once() -> None:
    groups = ["a", "b", "a", "a", "c"]
    kept = one_per_group(groups)
    assert [groups[place] for place in kept] == sorted(
        (groups[place] for place in kept), key=[groups[place] for place in kept].index
    )
    assert sorted(groups[place] for place in kept) == ["a", "b", "c"]
    with pytest.raises(BadInput, match="1 answers are too few"):
        guarantee([0.9] * 300, [1] * 300, ["s"] * 300, ["same"] * 300, {"s": [0.0]}, 0.05, 0.95)


@pytest.mark.parametrize("n", [9, 25, 200])
def test_sets_hold_the_right_choice_as_often_as_promised(n: int) -> None:
    generator = np.random.default_rng(n)
    alpha, missed, sizes = 0.2, 0, []
    for _ in range(REPETITIONS):
        probability = generator.dirichlet(np.full(4, 0.5), n + 1)
        sharp = probability**0.7  # the truth is flatter than what the model says
        true = (sharp / sharp.sum(1, keepdims=True)).cumsum(1)
        label = (generator.random(n + 1)[:, None] > true).sum(1).clip(0, 3)
        threshold = choice_threshold(probability[np.arange(n), label[:n]], alpha)
        chosen = choice_sets(probability[n:], threshold)[0]
        missed += not chosen[label[n]]
        sizes.append(int(chosen.sum()))
    deviation = math.sqrt(alpha * (1 - alpha) / REPETITIONS)
    assert missed / REPETITIONS <= alpha + 3 * deviation
    assert min(sizes) >= 1 and np.mean(sizes) < 4


def test_mapie_takes_the_same_quantile() -> None:
    classification = pytest.importorskip("mapie.classification")
    dummy = pytest.importorskip("sklearn.base")

    class Fixed(dummy.ClassifierMixin, dummy.BaseEstimator):  # type: ignore[misc, name-defined]
        def fit(self, x: np.ndarray, y: np.ndarray) -> Fixed:
            self.classes_, self.is_fitted_ = np.arange(3), True
            return self

        def predict_proba(self, x: np.ndarray) -> np.ndarray:
            return x

        def predict(self, x: np.ndarray) -> np.ndarray:
            return x.argmax(1)

    generator = np.random.default_rng(9)
    probability, label = generator.dirichlet(np.ones(3), 150), generator.integers(0, 3, 150)
    theirs = classification.SplitConformalClassifier(
        Fixed().fit(probability, label), confidence_level=0.85, prefit=True, conformity_score="lac"
    ).conformalize(probability[:100], label[:100])
    _, sets = theirs.predict_set(probability[100:])
    threshold = choice_threshold(probability[np.arange(100), label[:100]], 0.15)
    inside = probability[100:] >= threshold - 1e-12
    np.testing.assert_array_equal(inside, sets[:, :, 0])


def test_the_controlled_loss_is_within_its_limit_on_average() -> None:
    generator = np.random.default_rng(10)
    thresholds, losses = np.linspace(0, 1, 101), []
    for _ in range(REPETITIONS):
        score = generator.random(41)
        loss = (score[:40] > thresholds[:, None]) * 1.0
        found = controlled_threshold(loss, thresholds.tolist(), 0.1)
        losses.append(score[40] > found)
    assert np.mean(losses) <= 0.1 + 3 * math.sqrt(0.09 / REPETITIONS)
    assert np.mean(losses) >= 0.04, "a threshold that is never passed is no use"


def test_what_cannot_be_controlled_is_refused() -> None:
    with pytest.raises(BadInput, match="rises with the threshold"):
        controlled_threshold([[0.0], [1.0]], [0.1, 0.2], 0.5)
    with pytest.raises(BadInput, match="at least 9 answers"):
        controlled_threshold([[1.0, 1.0], [0.0, 0.0]], [0.1, 0.2], 0.1)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=200))
def test_candidates_fall_to_nothing(confidence: list[float]) -> None:
    tried = candidates(confidence)
    assert tried == sorted(set(tried), reverse=True) and tried[-1] == 0.0


def test_a_guarantee_survives_its_file(tmp_path: Path) -> None:
    found = guarantee(
        [0.9] * 100, [1] * 100, ["s"] * 100, [str(n) for n in range(100)], {"s": [0.5]}, 0.1, 0.9
    )
    save_guarantee(found, tmp_path / "guarantee.json")
    assert load_guarantee(tmp_path / "guarantee.json") == found
    assert isinstance(found, Guarantee)
    with pytest.raises(BadInput, match="no guarantee"):
        load_guarantee(tmp_path / "none.json")
