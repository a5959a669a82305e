from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gyrocompass.core.config import parse
from gyrocompass.core.errors import ConfigError
from gyrocompass.measure.diversity import bleu, distinct, self_bleu
from gyrocompass.measure.tasks.sweep import Setting, Sweep

TEXT = st.lists(st.sampled_from("abcd"), min_size=1, max_size=8).map(" ".join)
TEXTS = st.lists(TEXT, min_size=2, max_size=5)


@given(TEXTS)
def test_measures_are_shares_and_order_does_not_matter(texts: list[str]) -> None:
    for n in (1, 2):
        assert 0 <= distinct(texts, n) <= 1
        assert distinct(texts, n) == distinct(texts[::-1], n)
    assert 0 <= self_bleu(texts) <= 1 + 1e-12
    assert self_bleu(texts) == pytest.approx(self_bleu(texts[::-1]))


@given(TEXT, st.integers(2, 5))
def test_copies_are_not_diverse(text: str, count: int) -> None:
    assert self_bleu([text] * count) == pytest.approx(1)
    assert distinct([text] * count, 1) <= 1 / count + 1e-12 or " " in text


def test_bleu_is_its_formula() -> None:
    own, other = ["the", "cat", "sat", "on", "mats"], ["the", "cat", "is", "on", "mats", "now"]
    # p_1 = 4/5; p_2 = (2+1)/(4+1); p_3 = (0+1)/(3+1); p_4 = (0+1)/(2+1); r = 6, c = 5
    expected = (4 / 5 * 3 / 5 * 1 / 4 * 1 / 3) ** 0.25 * math.exp(1 - 6 / 5)
    assert bleu(own, [other]) == pytest.approx(expected)
    assert bleu(["x"], [["y"]]) == 0 and bleu([], [["y"]]) == 0


def test_settings_have_names() -> None:
    assert Setting(temperature=0.7, top_p=0.9, top_k=5).label == "T 0.7, top-p 0.9, top-k 5"
    with pytest.raises(ConfigError, match="two settings are the same"):
        parse(Sweep, {"settings": [{}, {"temperature": 1.0}]}, "sweep")
