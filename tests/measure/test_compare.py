"""Comparisons of two models on the same groups."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gyrocompass.core.errors import BadInput
from gyrocompass.measure.compare import (
    Line,
    Paired,
    aligned,
    benjamini_hochberg,
    cuped,
    holm,
    lines,
    not_inferior,
    paired,
    sample_size,
)


def groups(seed: int, effect: float, n: int = 60) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    weight = generator.lognormal(3, 0.8, n)
    hard = generator.normal(3, 1, n)
    a = weight * (hard + effect + generator.normal(0, 0.2, n))
    return a, weight * (hard + generator.normal(0, 0.2, n)), weight


def test_the_interval_holds_the_difference_as_often_as_it_says() -> None:
    held = [
        result.low <= 0.1 <= result.high
        for seed in range(300)
        for result in [paired(*groups(seed, 0.1), resamples=500)]
    ]
    assert 0.90 <= np.mean(held) <= 0.98


def test_the_p_value_is_uniform_where_there_is_no_difference() -> None:
    p = np.array([paired(*groups(seed, 0.0), resamples=400).p_value for seed in range(400)])
    assert np.mean(p <= 0.05) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)
    assert 0.4 < p.mean() < 0.6


def test_pairing_sees_what_separate_intervals_hide() -> None:
    a, b, weight = groups(0, 0.1, 200)
    found = paired(a, b, weight)
    separate = 2 * 1.96 * math.sqrt(2) * np.std(a / weight) / math.sqrt(200)
    assert found.low > 0 and found.high - found.low < separate / 3 and found.p_value < 0.01


def test_the_flips_are_those_of_all_signs() -> None:
    gap = np.array([1.0, 2.0, -0.5, 3.0])
    signs = np.array(np.meshgrid(*[[-1, 1]] * 4)).reshape(4, -1)
    exact = np.mean(np.abs(gap @ signs) >= abs(gap.sum()) - 1e-9)
    found = paired(gap, np.zeros(4), np.ones(4), resamples=20000)
    assert found.p_value == pytest.approx(exact, abs=0.01)


@given(st.dictionaries(st.text(max_size=3), st.floats(0, 1), min_size=1, max_size=8))
def test_corrections_never_make_a_p_value_smaller(p_values: dict[str, float]) -> None:
    by_holm, by_share = holm(p_values), benjamini_hochberg(p_values)
    for name, p in p_values.items():
        assert p <= by_share[name] + 1e-12 and by_share[name] <= by_holm[name] + 1e-12 <= 1 + 1e-9


def test_holm_keeps_the_chance_of_any_false_alarm() -> None:
    generator = np.random.default_rng(1)
    alarms = [
        min(holm({str(n): p for n, p in enumerate(row)}).values()) <= 0.05
        for row in generator.random((2000, 6))
    ]
    assert np.mean(alarms) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 2000)


def test_a_guardrail_holds_only_where_it_is_shown() -> None:
    a, b, weight = groups(2, 0.0, 400)
    assert not_inferior(a, b, weight, 0.05).holds
    few = slice(0, 4)
    assert not not_inferior(a[few], b[few], weight[few], 0.01).holds
    worse, than, weights = groups(3, 0.1, 400)
    assert not not_inferior(worse, than, weights, 0.05).holds
    assert not_inferior(worse, than, weights, 0.05, lower_is_better=False).holds


def test_a_guardrail_lets_what_is_just_too_bad_pass_in_5_percent() -> None:
    passed = [not_inferior(*groups(seed, 0.1), 0.1, resamples=400).holds for seed in range(400)]
    assert np.mean(passed) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)


def test_cuped_keeps_the_mean_and_takes_variance() -> None:
    generator = np.random.default_rng(4)
    before = generator.normal(0, 1, 5000)
    outcome = 0.8 * before + generator.normal(0.3, 0.6, 5000)
    found = cuped(outcome, before)
    assert found.adjusted_N.mean() == pytest.approx(outcome.mean())
    assert found.theta == pytest.approx(0.8, abs=0.03)
    assert found.variance_left == pytest.approx(1 - np.corrcoef(before, outcome)[0, 1] ** 2)
    assert cuped(outcome, np.ones(5000)).variance_left == 1


def test_the_planned_number_sees_the_difference_as_often_as_planned() -> None:
    n = sample_size(0.25, 1.0, power=0.8)
    generator = np.random.default_rng(5)
    a, b = generator.normal(0.25, 1, (2000, n)), generator.normal(0, 1, (2000, n))
    z = (a.mean(1) - b.mean(1)) / np.sqrt(a.var(1, ddof=1) / n + b.var(1, ddof=1) / n)
    assert np.mean(np.abs(z) > 1.96) == pytest.approx(0.8, abs=0.03)
    assert sample_size(0.25, 1.0, paired=True) * 2 == pytest.approx(n, abs=2)


def test_verdicts_are_about_the_first_model() -> None:
    clear = Paired(-0.1, -0.2, -0.05, 0.001, 50, 100.0)
    found = lines(
        {
            ("nats", "code"): clear,
            ("right", "code"): clear,
            ("tokens", "code"): clear,
            ("nats", "prose"): clear._replace(p_value=0.5),
        },
        {"nats": True, "right": False, "tokens": None},
    )
    assert [line.verdict() for line in found] == ["better", "worse", "differs", "no difference shown"]
    assert isinstance(found[0], Line) and found[0].p_adjusted == pytest.approx(0.004)


def test_bad_input_is_told() -> None:
    with pytest.raises(BadInput, match="not the same groups"):
        paired([1, 2], [1], [1, 1])
    with pytest.raises(BadInput, match="there are not two"):
        paired([1], [1], [1])
    with pytest.raises(BadInput, match="not finite"):
        paired([1, math.nan], [1, 1], [1, 1])
    with pytest.raises(BadInput, match="1 are not in both, such as y"):
        aligned({"x": (1, 1), "y": (1, 1)}, {"x": (1, 1)})
    with pytest.raises(BadInput, match="bits per byte"):
        aligned({"x": (1, 1)}, {"x": (1, 2)})
    with pytest.raises(BadInput, match="difference of 0"):
        sample_size(0, 1)
    with pytest.raises(BadInput, match="measures from before"):
        cuped([1, 2], [1])
