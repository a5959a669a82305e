from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score

from gyrocompass.serve.agreement import Looked, error_rate, kappa

PAIRS = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abc")), min_size=2, max_size=60)


@given(PAIRS)
def test_kappa_is_cohen_s(pairs: list[tuple[str, str]]) -> None:
    found = kappa(pairs)
    first, second = zip(*pairs, strict=True)
    if len({*first, *second}) == 1:
        assert found == (1.0, None, None)
        return
    assert found.value == pytest.approx(cohen_kappa_score(first, second))
    assert found.low is not None and found.high is not None
    assert found.low - 1e-12 <= found.value <= found.high + 1e-12


def test_the_interval_of_kappa_covers() -> None:
    """Two raters who each say the truth in 85 of 100 cases."""
    draw = np.random.default_rng(0)
    covered, true = 0, 0.0
    truth_N, n = draw.random(200_000) < 0.4, 80
    first_N, second_N = (truth_N ^ (draw.random(truth_N.size) < 0.15) for _ in range(2))
    true = cohen_kappa_score(first_N, second_N)
    for start in range(0, 500 * n, n):
        pairs = list(
            zip(first_N[start : start + n].tolist(), second_N[start : start + n].tolist(), strict=True)
        )
        found = kappa(pairs)
        assert found.low is not None and found.high is not None
        covered += found.low <= true <= found.high
    assert covered >= 0.92 * 500


def test_what_was_drawn_says_how_often_all_are_wrong() -> None:
    """Answers of low confidence are drawn more often and wrong more often: the plain share is far off."""
    draw = np.random.default_rng(1)
    covered, estimates, plain = 0, [], []
    for _ in range(600):
        unsure_N = draw.random(4000) < 0.2
        wrong_N = draw.random(4000) < np.where(unsure_N, 0.4, 0.05)
        pi_N = np.where(unsure_N, 0.3, 0.03)
        drawn_N = draw.random(4000) < pi_N
        looked = [Looked(bool(w), float(p)) for w, p in zip(wrong_N[drawn_N], pi_N[drawn_N], strict=True)]
        found = error_rate(looked)
        assert found.low is not None and found.high is not None
        covered += found.low <= 0.12 <= found.high
        estimates.append(found.value)
        plain.append(np.mean([one.wrong for one in looked]))
    assert covered >= 0.93 * 600
    assert np.mean(estimates) == pytest.approx(0.12, abs=0.004)
    assert np.mean(plain) > 0.25


def test_without_a_wrong_one_there_is_still_an_interval() -> None:
    none = error_rate([Looked(False, 0.1)] * 30)
    assert none.value == none.low == 0 and none.high == pytest.approx(1 - 0.025 ** (1 / 30))
    assert error_rate([Looked(True, 0.1)]) == (1.0, None, None)
