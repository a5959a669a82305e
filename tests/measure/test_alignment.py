"""The figures of alignment: means and differences clustered by group, and a reward model's calibration."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gyrocompass.measure.alignment import (
    Figure,
    calibration,
    expected_calibration_error,
    figures_from,
    fit_temperature,
    middle,
    paired_difference,
    places,
)
from gyrocompass.measure.intervals import ratio_estimate

values = st.lists(st.tuples(st.floats(-5, 5), st.sampled_from("abcdef")), min_size=1, max_size=30)


@settings(deadline=None)
@given(values)
def test_a_figure_is_the_mean_whatever_the_groups(pairs: list[tuple[float, str]]) -> None:
    numbers, groups = [value for value, _ in pairs], [group for _, group in pairs]
    figure = Figure.of("m", "s", numbers, groups)
    assert figure.value == pytest.approx(np.mean(numbers), abs=1e-12)
    assert (figure.size, figure.groups) == (len(pairs), len(set(groups)))
    (again,) = figures_from([json.loads(json.dumps(figure._asdict()))])
    assert again == figure


def test_groups_are_the_clusters() -> None:
    """Ten equal copies of each of four pairs say no more than the four."""
    once = Figure.of("m", "s", [0.0, 1.0, 1.0, 0.0], list("abcd"))
    copied = Figure.of("m", "s", [0.0, 1.0, 1.0, 0.0] * 10, list("abcd") * 10)
    assert copied[2:5] == pytest.approx(once[2:5]) and copied.groups == 4


def test_a_difference_is_paired() -> None:
    """What groups have in common cancels: a difference of 1/10 everywhere has no width."""
    base = np.array([0.1, 0.9, 0.4, 0.6])
    one, other = (Figure.of("m", "s", base + shift, list("abcd")) for shift in (0.1, 0.0))
    change = paired_difference(one, other)
    assert change is not None and change == pytest.approx((0.1, 0.1, 0.1))
    alone = ratio_estimate(base, np.ones(4))
    assert alone.low is not None and alone.high is not None and alone.high - alone.low > 0.5


def test_shares_that_are_equal_everywhere_leave_room_for_a_difference() -> None:
    one = Figure.of("m", "s", [0.0] * 20, [str(g) for g in range(20)], is_share=True)
    assert one.low == 0.0 and one.high is not None and 0.1 < one.high < 0.2
    change = paired_difference(one, one)
    assert change is not None and change == pytest.approx((0.0, -one.high, one.high))
    counts = one._replace(is_share=False)
    assert paired_difference(counts, counts) == (0.0, 0.0, 0.0)


def test_models_judged_on_other_groups_are_not_compared() -> None:
    assert paired_difference(Figure.of("m", "s", [1.0], ["a"]), Figure.of("m", "s", [1.0], ["b"])) is None


def test_the_interval_of_a_difference_holds_the_truth() -> None:
    """95% of 400 simulated comparisons with a true change of 0.3, groups that differ and unequal sizes."""
    random = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        groups = [str(g) for g in range(25) for _ in range(1 + g % 3)]
        level = dict(zip(map(str, range(25)), random.normal(0, 2, 25), strict=True))
        before = [level[g] + random.normal() for g in groups]
        after = [level[g] + 0.3 + random.normal() for g in groups]
        change = paired_difference(Figure.of("m", "s", after, groups), Figure.of("m", "s", before, groups))
        assert change is not None and change.low is not None and change.high is not None
        held += change.low <= 0.3 <= change.high
    assert 0.92 <= held / 400 <= 0.98


def margins(temperature: float, size: int, seed: int) -> np.ndarray:
    """Margins of a reward model that says `temperature` times what it knows."""
    random = np.random.default_rng(seed)
    true = np.abs(random.normal(0, 2, size))
    right = random.random(size) < 1 / (1 + np.exp(-true))
    return temperature * np.where(right, true, -true)


@pytest.mark.parametrize("temperature", [0.25, 1.0, 4.0])
def test_the_temperature_is_found_and_mends_the_error(temperature: float) -> None:
    margin_P = margins(temperature, 20_000, 3)
    assert fit_temperature(margin_P) == pytest.approx(temperature, rel=0.1)
    found = calibration(margin_P, [str(number) for number in range(len(margin_P))])
    assert found is not None and found.ece_after < 0.02
    if temperature != 1:
        assert found.ece_before > 0.05


@given(st.integers(1, 200), st.floats(0.5, 20))
@settings(deadline=None, max_examples=30)
def test_pairs_that_are_all_right_do_not_drive_the_temperature_to_its_bound(size: int, margin: float) -> None:
    """sigmoid(margin / tau) = (P + 1) / (P + 2), so tau = margin / log(P + 1)."""
    assert fit_temperature(np.full(size, margin)) == pytest.approx(margin / np.log(size + 1), rel=1e-3)


def test_a_temperature_that_was_saved_is_measured_on_the_other_half() -> None:
    margin_P = margins(4.0, 2_000, 5)
    groups = [str(number) for number in range(len(margin_P))]
    fitted, split = calibration(margin_P, groups), middle(groups)
    assert fitted is not None and fitted.pairs == 1_000
    assert calibration(margin_P, groups, fitted.temperature, split) == fitted
    # Of other pairs, those that stand before the split may have been fitted on: they are left out.
    behind_P = places(groups) >= split
    for some in (range(500), np.flatnonzero(behind_P)):
        found = calibration(margin_P[some], [groups[n] for n in some], fitted.temperature, split)
        assert found is not None and found.pairs == behind_P[some].sum()
        own_P = margin_P[some][behind_P[some]]
        assert found.ece_after == expected_calibration_error(own_P / fitted.temperature)
    before = np.flatnonzero(~behind_P)
    assert calibration(margin_P[before], [groups[n] for n in before], fitted.temperature, split) is None


@given(st.lists(st.text(max_size=3), min_size=2, max_size=12, unique=True), st.integers(1, 3))
@settings(deadline=None)
def test_both_halves_have_a_group(groups: list[str], times: int) -> None:
    measured_P = places(groups * times) >= middle(groups * times)
    assert measured_P.sum() == times * (len(groups) - len(groups) // 2)


def test_a_perfect_model_has_an_error_above_zero() -> None:
    errors = [expected_calibration_error(margins(1.0, 300, seed)) for seed in range(50)]
    assert 0.02 < np.mean(errors) < 0.08


def test_one_half_alone_is_not_calibrated() -> None:
    assert calibration([1.0, -1.0], ["a", "a"]) is None
