from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gyrocompass.measure.meaning import agreements, by_words, clusters

TEXTS = st.lists(
    st.sampled_from(["four", "It is four", "it is FOUR!", "five", "is it four?", ""]), min_size=2, max_size=7
)


@given(TEXTS, st.floats(0.1, 1.0))
def test_confidences_are_shares_and_one_only_where_all_agree(texts: list[str], bound: float) -> None:
    found = agreements(texts, by_words(bound))
    assert all(0 <= value <= 1 for value in found.values())
    labels = clusters(texts, by_words(bound))
    assert (found["semantic entropy"] == pytest.approx(1)) == (len(set(labels)) == 1)
    assert (found["agreement"] == 1) == (len(set(labels)) == 1)
    if len(set(labels)) == len(texts):
        assert found["semantic entropy"] == pytest.approx(0) and found["agreement"] == 0


@given(TEXTS)
def test_a_higher_bound_never_joins(texts: list[str]) -> None:
    assert len(set(clusters(texts, by_words(1.0)))) >= len(set(clusters(texts, by_words(0.1))))


def test_words_decide_in_any_order_and_case() -> None:
    assert clusters(["It is four.", "is it FOUR", "it is five", ""], by_words(1.0)) == [0, 0, 1, 2]
    assert clusters(["it is four", "it is five"], by_words(0.6)) == [0, 0]
