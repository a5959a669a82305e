"""Each objective of single answers against its published formula, written again in float64."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from direct_answers import (
    Answer,
    Labels,
    Window,
    assert_law_1,
    assert_terms,
    assert_two_passes,
    make_window,
    split,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gyrocompass.core.errors import BadInput
from gyrocompass.loss.objective import parse_objectives
from gyrocompass.loss.registry import OBJECTIVES

BETA = 0.7
seeds = st.integers(0, 2**20)


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + (-x).exp())


def labels(unit: int, side: int) -> dict[str, float]:
    """Every third answer desirable, every fourth mismatched."""
    return {"desirable": float(unit % 3 == 0), "mismatched": float(unit % 4 == 3)}


def in_order(window: Window) -> list[Answer]:
    """One answer a unit, which is the order of their segments too."""
    answers = window.answers()
    return [answers[key] for key in sorted(answers)]


def singles(n_units: int, seed: int, **options: Any) -> Window:
    return make_window(n_units, seed, **{"sides": (1,), "labels": labels, **options})


def weighted_mean(pairs: list[tuple[Tensor, float]]) -> float:
    return sum(float(value.detach()) * weight for value, weight in pairs) / sum(w for _, w in pairs)


@pytest.mark.parametrize("kl", ["matched", "mismatched"])
@settings(deadline=None, max_examples=8)
@given(seed=seeds, n_units=st.integers(4, 8))
def test_kto_is_its_formula(kl: str, seed: int, n_units: int) -> None:
    window = singles(n_units, seed)
    answers = in_order(window)
    judges = [a for a in answers if kl == "matched" or a.label["mismatched"]]
    z = max(0.0, weighted_mean([(a.ratio, a.weight) for a in judges]))
    expected = []
    for a in answers:
        if a.label["desirable"]:
            value = 1.3 - 1.3 * sigmoid(BETA * (a.ratio - z))
        else:
            value = 0.6 - 0.6 * sigmoid(BETA * (z - a.ratio))
        expected.append((value, 0.0 if kl == "mismatched" and a.label["mismatched"] else a.weight))
    options = {"beta": BETA, "desirable_weight": 1.3, "undesirable_weight": 0.6, "kl": kl}
    assert_terms({"kto": options}, window, expected)


@settings(deadline=None, max_examples=8)
@given(seed=seeds, n_units=st.integers(1, 5))
def test_apo_zero_unpaired_is_its_formula(seed: int, n_units: int) -> None:
    window = singles(n_units, seed)
    expected = [
        (1 - sigmoid(BETA * a.ratio) if a.label["desirable"] else sigmoid(BETA * a.ratio), a.weight)
        for a in in_order(window)
    ]
    assert_terms({"apo_zero_unpaired": {"beta": BETA}}, window, expected)


@settings(deadline=None, max_examples=8)
@given(seed=seeds, n_units=st.integers(2, 6))
def test_bco_unpaired_is_its_formula(seed: int, n_units: int) -> None:
    window = singles(n_units, seed)
    answers = in_order(window)
    means = [
        weighted_mean([(BETA * a.ratio, a.weight) for a in answers if a.label["desirable"] == kind])
        for kind in (1.0, 0.0)
    ]
    delta = sum(means) / 2
    expected = [
        (-sigmoid((BETA * a.ratio - delta) * (1 if a.label["desirable"] else -1)).log(), a.weight)
        for a in answers
    ]
    assert_terms({"bco_unpaired": {"beta": BETA}}, window, expected)


@settings(deadline=None, max_examples=8)
@given(seed=seeds, parts=st.integers(1, 3))
def test_the_split_changes_nothing(seed: int, parts: int) -> None:
    window = singles(6, seed)
    assert_law_1(["apo_zero_unpaired"], window, split(window.batch, seed, parts))


@settings(deadline=None, max_examples=8)
@given(seed=seeds, parts=st.integers(1, 3))
def test_the_split_changes_nothing_that_the_window_judges(seed: int, parts: int) -> None:
    window = singles(8, seed)
    entries = ["kto", {"kto": {"kl": "mismatched", "name": "mismatched"}}, "bco_unpaired"]
    assert_two_passes(entries, window, split(window.batch, seed, parts))


def test_what_the_window_judges_by_needs_the_whole_window() -> None:
    assert OBJECTIVES["kto"].whole_window and OBJECTIVES["bco_unpaired"].whole_window
    assert not OBJECTIVES["apo_zero_unpaired"].whole_window


@pytest.mark.parametrize(
    ("name", "value"), [("kto", 0.5), ("apo_zero_unpaired", 0.5), ("bco_unpaired", math.log(2))]
)
def test_the_first_step(name: str, value: float) -> None:
    window, composite = singles(4, seed=1), parse_objectives([name])
    log_probs = window.log_probs(composite)
    columns = {**window.batch.columns, "reference_logprob": log_probs.logprob_T.detach()}
    terms = composite(log_probs, dataclasses.replace(window.batch, columns=columns))[name]
    torch.testing.assert_close(terms.value, torch.full_like(terms.value, value))


def test_kto_without_losses_of_reference_point_is_apo_zero() -> None:
    """A policy that has moved away from every answer has z = 0."""
    window, composite = singles(4, seed=2), parse_objectives(["kto", "apo_zero_unpaired"])
    columns = {**window.batch.columns, "reference_logprob": torch.zeros_like(window.batch.weight_T)}
    terms = composite(window.log_probs(composite), dataclasses.replace(window.batch, columns=columns))
    assert torch.equal(terms["kto"].value, terms["apo_zero_unpaired"].value)


@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired", "bco_unpaired"])
def test_masked_answers_give_exactly_none(name: str) -> None:
    window, composite = singles(4, seed=3), parse_objectives([name])
    gone_T = window.batch.unit_T == 2
    batch = dataclasses.replace(
        window.batch,
        weight_T=window.batch.weight_T.masked_fill(gone_T, 0.0),
        target_T=window.batch.target_T.masked_fill(gone_T, -100),
    )
    window = window._replace(batch=batch)
    value, weight = composite(window.log_probs(composite), batch)[name]
    (gradient_TD,) = torch.autograd.grad((value * weight).sum(), window.h_TD)
    assert len(value) == 3 and not gradient_TD[gone_T].any() and gradient_TD[~gone_T].any()


@pytest.mark.parametrize(
    ("options", "given_labels", "message"),
    [
        ({}, lambda unit, side: {"desirable": 0.5}, "must be 1 or 0"),
        ({}, lambda unit, side: {}, "prompt, completion, label"),
        ({"kl": "mismatched"}, lambda unit, side: {"desirable": 1.0}, "or set kl: matched"),
        (
            {"kl": "mismatched"},
            lambda unit, side: {"desirable": 1.0, "mismatched": 0.0},
            "no mismatched answer",
        ),
    ],
)
def test_labels_that_do_not_fit(options: dict[str, str], given_labels: Labels, message: str) -> None:
    window, composite = singles(3, seed=0, labels=given_labels), parse_objectives([{"kto": options}])
    with pytest.raises(BadInput, match=message):
        composite(window.log_probs(composite), window.batch)
