"""Calibration metrics: closed forms, oracles of others, and what a perfect model looks like."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gyrocompass.core.errors import BadInput
from gyrocompass.measure.calibration_metrics import (
    auroc,
    bins,
    brier,
    by_slice,
    calibration_error,
    classwise_error,
    expected_calibration_error,
    judged,
    log_loss,
    risk_coverage,
)


@st.composite
def answers(draw: st.DrawFn) -> tuple[list[float], list[int]]:
    pairs = draw(
        st.lists(
            st.tuples(st.sampled_from([0.0, 0.05, 0.1, 0.25, 0.5, 0.6, 0.77, 0.9, 1.0]), st.integers(0, 1)),
            min_size=1,
            max_size=60,
        )
    )
    return [p for p, _ in pairs], [c for _, c in pairs]


@given(answers(), st.integers(1, 20))
def test_the_bars_hold_every_answer_once_and_the_ece_is_their_sum(
    case: tuple[list[float], list[int]], n_bins: int
) -> None:
    confidence, correct = case
    for kind in ("width", "mass"):
        bars = bins(confidence, correct, n_bins, kind)
        assert sum(bar.size for bar in bars) == len(confidence)
        total = sum(bar.size * abs(bar.accuracy - bar.confidence) for bar in bars) / len(confidence)
        assert expected_calibration_error(confidence, correct, n_bins, kind) == pytest.approx(
            total, abs=1e-12
        )
        assert all(bar.accuracy_low <= bar.accuracy <= bar.accuracy_high for bar in bars)


def test_bins_of_equal_mass_keep_equal_confidences_together() -> None:
    bars = bins([0.5] * 7 + [0.6, 0.7, 0.8], [1] * 10, n_bins=5, kind="mass")
    assert max(bar.size for bar in bars) >= 7
    spread = bins(np.linspace(0, 1, 1000), [1] * 1000, n_bins=10, kind="mass")
    assert {bar.size for bar in spread} == {100}


@given(answers())
def test_brier_is_the_sum_of_its_parts(case: tuple[list[float], list[int]]) -> None:
    found = brier(*case)
    assert found.score == pytest.approx(
        found.reliability - found.resolution + found.uncertainty + found.within, abs=1e-12
    )
    assert found.score == pytest.approx(np.mean((np.array(case[0]) - case[1]) ** 2))


def test_brier_within_bins_vanishes_where_each_bin_has_one_confidence() -> None:
    confidence = np.repeat([0.1, 0.35, 0.8], 50)
    correct = np.random.default_rng(0).random(150) < confidence
    assert brier(confidence, correct).within == pytest.approx(0, abs=1e-12)


def test_scikit_learn_says_the_same() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(1)
    confidence = generator.random(400).round(2)
    correct = (generator.random(400) < confidence**2).astype(int)
    assert auroc(confidence, correct) == pytest.approx(metrics.roc_auc_score(correct, confidence))
    assert brier(confidence, correct).score == pytest.approx(metrics.brier_score_loss(correct, confidence))
    inner = np.clip(confidence, 0.01, 0.99)
    assert log_loss(inner, correct) == pytest.approx(metrics.log_loss(correct, inner))


def test_netcal_says_the_same() -> None:
    netcal = pytest.importorskip("netcal.metrics")
    generator = np.random.default_rng(2)
    confidence = generator.uniform(0.001, 0.999, 500)
    correct = (generator.random(500) < confidence**1.5).astype(int)
    theirs = netcal.ECE(bins=15).measure(confidence, correct)
    assert expected_calibration_error(confidence, correct, 15) == pytest.approx(theirs, abs=1e-9)


def test_a_perfect_model_has_an_ece_of_0_064_over_300_answers() -> None:
    generator = np.random.default_rng(3)
    confidence = generator.beta(5, 2, 300)
    seen = [
        calibration_error(confidence, generator.random(300) < confidence, seed=seed) for seed in range(60)
    ]
    assert seen[0].null_mean == pytest.approx(0.064, abs=0.003)
    assert np.mean([one.value for one in seen]) == pytest.approx(0.064, abs=0.004)
    assert np.mean([one.p_value <= 0.05 for one in seen]) <= 0.15
    assert np.mean([one.debiased for one in seen]) < 0.03
    assert np.mean([one.low == 0 for one in seen]) >= 0.9


def test_a_model_that_is_too_sure_is_found_out() -> None:
    generator = np.random.default_rng(4)
    confidence = generator.uniform(0.5, 1, 1000)
    correct = generator.random(1000) < confidence - 0.2
    found = calibration_error(confidence, correct, [str(n // 2) for n in range(1000)])
    assert found.p_value < 0.01 and found.low < 0.2 < found.high + 0.02
    assert found.debiased == pytest.approx(0.2, abs=0.04)


def test_intervals_hold_the_true_error_about_as_often_as_they_say() -> None:
    generator = np.random.default_rng(5)
    held = 0
    for seed in range(100):
        confidence = generator.uniform(0.5, 1, 600)
        found = calibration_error(confidence, generator.random(600) < confidence - 0.15, seed=seed)
        held += found.low <= 0.15 <= found.high
    assert held >= 85


def test_groups_widen_the_interval() -> None:
    generator = np.random.default_rng(6)
    confidence = np.repeat(generator.uniform(0.5, 1, 100), 10)
    correct = np.repeat(generator.random(100) < 0.6, 10)
    alone = calibration_error(confidence, correct)
    grouped = calibration_error(confidence, correct, [str(n // 10) for n in range(1000)])
    assert grouped.high - grouped.low > 1.5 * (alone.high - alone.low)


def test_classwise_is_the_mean_over_classes() -> None:
    probability = np.array([[0.7, 0.3], [0.2, 0.8], [0.6, 0.4], [0.9, 0.1]])
    label = np.array([0, 1, 1, 0])
    each = [expected_calibration_error(probability[:, c], label == c, 10) for c in (0, 1)]
    assert classwise_error(probability, label, 10) == pytest.approx(np.mean(each))


def test_auroc_counts_ties_half_and_is_nothing_for_one_class() -> None:
    assert auroc([0.5, 0.5], [1, 0]) == 0.5
    assert auroc([0.5, 0.4], [1, 1]) is None


def test_log_loss_is_infinite_where_the_impossible_came() -> None:
    assert log_loss([0.0, 0.5], [1, 1]) == math.inf
    assert log_loss([0.5], [0]) == pytest.approx(math.log(2))


@given(answers())
def test_the_risk_at_full_coverage_is_the_share_of_errors(case: tuple[list[float], list[int]]) -> None:
    curve = risk_coverage(*case)
    assert curve.coverage_K[-1] == 1 and curve.risk_K[-1] == pytest.approx(1 - np.mean(case[1]))
    assert (np.diff(curve.threshold_K) < 0).all() and curve.excess_area >= -1e-12


def test_the_area_is_the_mean_over_random_orders_of_ties() -> None:
    confidence, correct = np.array([0.9, 0.5, 0.5, 0.5]), np.array([1, 0, 1, 0])
    generator, areas = np.random.default_rng(7), []
    for _ in range(4000):
        order = np.lexsort((generator.random(4), -confidence))
        areas.append(np.mean(np.cumsum(1 - correct[order]) / np.arange(1, 5)))
    assert risk_coverage(confidence, correct).area == pytest.approx(np.mean(areas), abs=0.01)


def test_a_perfect_ranking_has_no_excess_area() -> None:
    assert risk_coverage([0.9, 0.8, 0.2, 0.1], [1, 1, 0, 0]).excess_area == pytest.approx(0)


def test_slices_and_total() -> None:
    found = by_slice(len, ["b", "a", "b"])
    assert found == {"a": 1, "b": 2, "total": 3}


@pytest.mark.parametrize(
    ("confidence", "correct", "message"),
    [
        ([], [], "nothing to calibrate on"),
        ([0.5, math.nan], [1, 0], "a confidence is nan"),
        ([1.2], [1], "a confidence is 1.2"),
        ([0.5], [0.5], "right or wrong"),
        ([0.5], [1, 0], "do not fit together"),
    ],
)
def test_bad_input_is_told(confidence: list[float], correct: list[float], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        judged(confidence, correct)
