"""Looking often never inflates error: simulated nulls, power, and intervals that hold at all times."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gyrocompass.core.errors import BadInput
from gyrocompass.measure.sequential import Betting, MixtureTest, betting_p_values

NULLS, LENGTH, LOOKS = 2000, 2000, 100
AT = np.linspace(LENGTH // LOOKS, LENGTH, LOOKS).astype(int) - 1
CHANCE = 0.05 + 3 * math.sqrt(0.05 * 0.95 / NULLS)


def outcomes(rate_a: float, rate_b: float, repetitions: int, length: int, seed: int) -> np.ndarray:
    """Differences of two answers, one from each arm, right or wrong."""
    generator = np.random.default_rng(seed)
    a, b = generator.random((2, repetitions, length), dtype=np.float32)
    return (a < rate_a).astype(float) - (b < rate_b)


def naive_p(difference: np.ndarray) -> np.ndarray:
    """|z| of a fixed-size test at each look: what not to do."""
    n = AT + 1.0
    sums, squares = np.cumsum(difference, 1)[:, AT], np.cumsum(difference**2, 1)[:, AT]
    deviation = np.sqrt(np.maximum(squares / n - (sums / n) ** 2, 1e-12))
    return np.abs(sums / np.sqrt(n) / deviation)


@pytest.fixture(scope="module")
def nulls() -> np.ndarray:
    return outcomes(0.7, 0.7, NULLS, LENGTH, 0)


def test_a_hundred_looks_by_betting_err_in_at_most_5_percent(nulls: np.ndarray) -> None:
    assert np.mean(betting_p_values(nulls)[:, -1] <= 0.05) <= 0.05


def test_a_hundred_looks_at_a_mixture_err_in_at_most_5_percent(nulls: np.ndarray) -> None:
    assert np.mean(MixtureTest(tau=0.1).p_values(nulls)[:, AT].min(1) <= 0.05) <= 0.05


def test_naive_peeking_errs_in_more_than_a_third(nulls: np.ndarray) -> None:
    assert np.mean(naive_p(nulls).max(1) > 1.96) > 0.3
    assert np.mean(naive_p(nulls)[:, -1] > 1.96) <= CHANCE, "one look is as good as it says"


def test_the_power_stands_beside_that_of_one_look() -> None:
    """A difference of 5 points, planned for 80% power with one look at the end."""
    difference = outcomes(0.75, 0.70, 500, 1250, 1)
    fixed = np.abs(difference.mean(1)) / (difference.std(1) / math.sqrt(1250)) > 1.96
    betting = betting_p_values(difference)[:, -1] <= 0.05
    mixture = MixtureTest(tau=0.05).p_values(difference)[:, -1] <= 0.05
    assert 0.7 < fixed.mean() < 0.9
    assert betting.mean() > 0.4 and mixture.mean() > 0.4
    longer = outcomes(0.75, 0.70, 300, 3500, 2)
    assert (betting_p_values(longer)[:, -1] <= 0.05).mean() > 0.9
    early = (betting_p_values(outcomes(0.85, 0.70, 300, 1250, 3)) <= 0.05).argmax(1)
    assert np.median(early) < 500, "a large difference is seen early"


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from([-1.0, -0.5, 0.0, 0.25, 1.0]), min_size=1, max_size=60))
def test_one_by_one_is_all_at_once(difference: list[float]) -> None:
    test = Betting()
    seen = []
    for value in difference:
        test.observe(value)
        seen.append(test.verdict().p_value)
    np.testing.assert_allclose(seen, betting_p_values([difference])[0], rtol=1e-9)
    assert seen == sorted(seen, reverse=True)
    again = Betting.restored(test.state())
    again.observe(1.0)
    test.observe(1.0)
    assert again.verdict() == test.verdict()


def test_the_confidence_sequence_holds_the_mean_at_all_times() -> None:
    generator = np.random.default_rng(4)
    missed = 0
    for _ in range(100):
        test, values = Betting(), generator.choice([-1.0, 0.0, 1.0], 300, p=[0.1, 0.6, 0.3])
        for value in values:
            test.observe(float(value))
        found = test.verdict()  # sets only shrink: the last one is inside all before it
        missed += not found.low <= 0.2 <= found.high
    assert missed <= 11  # 5%, and three deviations
    assert found.high - found.low < 0.4


def test_the_mixture_sequence_is_the_test_turned_around() -> None:
    test, generator = MixtureTest(tau=0.1, least=50), np.random.default_rng(5)
    value = generator.normal(0.05, 1, 2000)
    for count in (60, 500, 2000):
        part = value[:count]
        half = test.half_width(float(part.var(ddof=1)), count)
        alone = MixtureTest(tau=0.1, least=count).p_values(part - part.mean() + half * 1.0001)[0, -1]
        assert alone <= 0.05
        assert MixtureTest(tau=0.1, least=count).p_values(part - part.mean() + half * 0.999)[0, -1] > 0.05
    assert test.half_width(1.0, 49) == math.inf


def test_a_difference_out_of_bounds_is_refused() -> None:
    with pytest.raises(BadInput, match=r"not in \[-1, 1\]"):
        Betting().observe(1.5)
    with pytest.raises(BadInput):
        Betting().observe(math.nan)
