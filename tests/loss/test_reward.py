"""Each objective of reward models against its formula, written again over single answers in float64.

Shape legend: T tokens, D hidden width, P pairs.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from direct_answers import Answer, Labels, Window, assert_law_1, assert_terms, make_window, split
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gyrocompass.core.errors import BadInput
from gyrocompass.loss.objective import parse_objectives

seeds = st.integers(0, 2**20)
POINTWISE = ("reward_regression", "reward_classification")


def log_sigmoid(x: Tensor) -> Tensor:
    return -torch.logaddexp(torch.zeros_like(x), -x)


def labels(unit: int, side: int) -> dict[str, float]:
    return {
        "margin": 0.3 * unit if side == 1 else 9.0,  # read at the chosen side
        "tie": float(unit % 3 == 0),
        "score": unit - 1.5 * side,
        "desirable": (0.0, 1.0, 0.25)[(unit + side) % 3],
    }


def pairs_of(window: Window) -> list[tuple[Answer, Answer]]:
    answers = window.answers()
    return [(answers[unit, 1], answers[unit, 0]) for unit, side in sorted(answers) if side == 1]


def reward(answer: Answer) -> Tensor:
    return answer.scalar_T[-1]


def bradley_terry(chosen: Answer, rejected: Answer, margin: float, centring: float) -> Tensor:
    r_c, r_r = reward(chosen), reward(rejected)
    return -(r_c.exp() / (r_c.exp() + (r_r + margin).exp())).log() + centring * (r_c + r_r) ** 2


def rao_kupper(chosen: Answer, rejected: Answer, eta: float) -> Tensor:
    """The model as published, in worths pi = exp(r) and theta = exp(eta)."""
    pi_c, pi_r, theta = reward(chosen).exp(), reward(rejected).exp(), math.exp(eta)
    if not chosen.label["tie"]:
        return -(pi_c / (pi_c + theta * pi_r)).log()
    tied = (theta**2 - 1) * pi_c * pi_r / ((pi_c + theta * pi_r) * (theta * pi_c + pi_r))
    return -tied.log()


@pytest.mark.parametrize("margin", [False, True])
@pytest.mark.parametrize("centring", [0.0, 0.2])
@settings(deadline=None, max_examples=10)
@given(seed=seeds, n_units=st.integers(1, 5))
def test_reward_pairs_are_their_formula(margin: bool, centring: float, seed: int, n_units: int) -> None:
    window = make_window(n_units, seed, labels=labels)
    expected = [
        (bradley_terry(c, r, c.label["margin"] if margin else 0.0, centring), c.weight)
        for c, r in pairs_of(window)
    ]
    assert_terms({"reward_pairs": {"margin": margin, "centring": centring}}, window, expected)


@settings(deadline=None, max_examples=15)
@given(seed=seeds, n_units=st.integers(1, 5), eta=st.floats(0.05, 2.0))
def test_ties_are_their_formula(seed: int, n_units: int, eta: float) -> None:
    window = make_window(n_units, seed, labels=labels)
    expected = [
        (rao_kupper(c, r, eta) + 0.1 * (reward(c) + reward(r)) ** 2, c.weight) for c, r in pairs_of(window)
    ]
    assert_terms({"reward_pairs_with_ties": {"threshold": eta, "centring": 0.1}}, window, expected)


@pytest.mark.parametrize("name", POINTWISE)
@settings(deadline=None, max_examples=10)
@given(seed=seeds, n_units=st.integers(1, 4))
def test_pointwise_objectives_are_their_formula(name: str, seed: int, n_units: int) -> None:
    window = make_window(n_units, seed, sides=(1,), labels=labels)
    answers, expected = window.answers(), []
    for key in sorted(answers):
        answer = answers[key]
        r, d = reward(answer), answer.label["desirable"]
        squared = (r - answer.label["score"]) ** 2
        entropy = -d * log_sigmoid(r) - (1 - d) * log_sigmoid(-r)
        expected.append((squared if name == "reward_regression" else entropy, answer.weight))
    assert_terms({name: {}}, window, expected)


def with_steps(window: Window, seed: int) -> Window:
    """Labels of steps at about half of the positions, prompts included, which do not count."""
    generator = torch.Generator().manual_seed(seed)
    shape = window.batch.weight_T.shape
    label_T = torch.randint(3, shape, generator=generator).double() / 2
    label_T = label_T.masked_fill(torch.rand(shape, generator=generator) < 0.5, math.nan)
    columns = {**window.batch.columns, "step_reward": label_T}
    return window._replace(batch=dataclasses.replace(window.batch, columns=columns))


@settings(deadline=None, max_examples=15)
@given(seed=seeds)
def test_process_rewards_are_their_formula(seed: int) -> None:
    window = with_steps(make_window(3, seed), seed)
    batch, expected = window.batch, []
    for t, label in enumerate(batch.columns["step_reward"].tolist()):
        r, weight = window.h_TD[t] @ window.scalar_D, float(batch.weight_T[t])
        if math.isnan(label) or weight == 0:
            expected.append((torch.zeros_like(r), 0.0))
        else:
            expected.append((-label * log_sigmoid(r) - (1 - label) * log_sigmoid(-r), weight))
    assert_terms({"process_reward": {}}, window, expected)


# --- formulas that people get wrong ---


def shifted(window: Window, by: float) -> Window:
    """All rewards higher: one more column of hidden states, 1 everywhere, with this weight in the head."""
    ones_T1 = torch.ones(len(window.h_TD), 1, dtype=torch.float64)
    h_TD = torch.cat([window.h_TD.detach(), ones_T1], dim=1).requires_grad_()
    scalar_D = torch.cat([window.scalar_D.detach(), torch.tensor([by], dtype=torch.float64)]).requires_grad_()
    w_VD = torch.cat([window.w_VD.detach(), torch.zeros(len(window.w_VD), 1, dtype=torch.float64)], dim=1)
    return Window(window.batch, h_TD, w_VD.requires_grad_(), scalar_D)


def test_formula_8_pairs_do_not_see_a_shift_and_centring_does() -> None:
    window = make_window(4, seed=1, labels=labels)
    composite = parse_objectives(["reward_pairs", {"reward_pairs": {"centring": 0.1, "name": "centred"}}])
    bias = {}
    for by in (0.0, 5.0):
        moved = shifted(window, by)
        terms = composite(moved.log_probs(composite), moved.batch)
        for name, (value_P, _) in terms.items():
            slope = torch.autograd.grad(value_P.sum(), moved.scalar_D, retain_graph=True)[0][-1]
            bias[name, by] = (value_P.detach(), float(slope))
    torch.testing.assert_close(bias["reward_pairs", 0.0][0], bias["reward_pairs", 5.0][0])
    assert bias["reward_pairs", 5.0][1] == pytest.approx(0.0, abs=1e-12)
    assert bias["centred", 5.0][1] > 1.0  # what pulls the level back


def test_formula_8_the_last_token_of_each_sequence_is_scored() -> None:
    """Not the row's last position, not padding, not the prompt: only there does the head get a gradient."""
    window, composite = make_window(3, seed=2, labels=labels), parse_objectives(["reward_pairs"])
    value_P, _ = composite(window.log_probs(composite), window.batch)["reward_pairs"]
    (gradient_TD,) = torch.autograd.grad(value_P.sum(), window.h_TD)
    segments = window.batch.segment_T.tolist()
    last = {segment: t for t, segment in enumerate(segments) if segment >= 0}
    assert gradient_TD.any(dim=1).nonzero().flatten().tolist() == sorted(last.values())


# --- law 1 ---


@settings(deadline=None, max_examples=8)
@given(seed=seeds, parts=st.integers(1, 4))
def test_the_split_changes_nothing(seed: int, parts: int) -> None:
    entries: list[Any] = [
        {"reward_pairs": {"margin": True, "centring": 0.1}},
        "reward_pairs_with_ties",
        *POINTWISE,
        "process_reward",
    ]
    window = with_steps(make_window(5, seed, labels=labels), seed)
    assert_law_1(entries, window, split(window.batch, seed, parts))


# --- limits ---


def test_a_head_of_zeros() -> None:
    """A new reward model knows nothing: ln 2 for pairs and labels, and the three outcomes sum to 1."""
    window = make_window(3, seed=3, labels=labels)
    window = window._replace(scalar_D=torch.zeros_like(window.scalar_D).requires_grad_())
    composite = parse_objectives(["reward_pairs", "reward_classification", "reward_pairs_with_ties"])
    terms = composite(window.log_probs(composite), window.batch)
    for name in ("reward_pairs", "reward_classification"):
        torch.testing.assert_close(terms[name].value, torch.full_like(terms[name].value, math.log(2)))
    tied, won = terms["reward_pairs_with_ties"].value[:2].neg().exp().tolist()
    assert 2 * won + tied == pytest.approx(1.0, abs=1e-12)


def test_a_vanishing_threshold_is_bradley_terry() -> None:
    window = make_window(4, seed=4, labels=lambda unit, side: {"tie": 0.0})
    composite = parse_objectives(["reward_pairs", {"reward_pairs_with_ties": {"threshold": 1e-9}}])
    plain, tied = composite(window.log_probs(composite), window.batch).values()
    torch.testing.assert_close(tied.value, plain.value, rtol=1e-8, atol=0)


def test_equal_rewards_of_a_tie_have_no_gradient() -> None:
    window = make_window(1, seed=5, labels=lambda unit, side: {"tie": 1.0})
    window = window._replace(scalar_D=torch.zeros_like(window.scalar_D).requires_grad_())
    composite = parse_objectives(["reward_pairs_with_ties"])
    value_P, _ = composite(window.log_probs(composite), window.batch)["reward_pairs_with_ties"]
    (gradient_D,) = torch.autograd.grad(value_P.sum(), window.scalar_D)
    torch.testing.assert_close(gradient_D, torch.zeros_like(gradient_D), rtol=0, atol=1e-12)


def test_masked_pairs_give_exactly_none() -> None:
    window = with_steps(make_window(3, seed=6, labels=labels), seed=6)
    gone_T = window.batch.unit_T == 1
    batch = dataclasses.replace(
        window.batch,
        weight_T=window.batch.weight_T.masked_fill(gone_T, 0.0),
        target_T=window.batch.target_T.masked_fill(gone_T, -100),
    )
    composite = parse_objectives(["reward_pairs", "reward_pairs_with_ties", *POINTWISE, "process_reward"])
    for name, (value, weight) in composite(window.log_probs(composite), batch).items():
        (gradient_TD,) = torch.autograd.grad((value * weight).sum(), window.h_TD, retain_graph=True)
        assert not gradient_TD[gone_T].any() and gradient_TD[~gone_T].any(), name


# --- bad input ---


@pytest.mark.parametrize(
    ("entry", "given_labels", "message"),
    [
        ({"reward_pairs": {"margin": True}}, lambda unit, side: {}, "a number: margin"),
        ({"reward_pairs_with_ties": {}}, lambda unit, side: {"tie": 0.5}, "'tie' is 0.5; it must be 1 or 0"),
        ({"reward_regression": {}}, lambda unit, side: {"score": math.nan}, "no finite number"),
        ({"reward_classification": {}}, lambda unit, side: {"desirable": 1.5}, "between 0 and 1"),
        ({"process_reward": {}}, lambda unit, side: {}, "no column 'step_reward'"),
        ({"process_reward": {}}, lambda unit, side: {"step_reward": -1.0}, "between 0 and 1"),
        ({"process_reward": {}}, lambda unit, side: {"step_reward": math.inf}, "no finite number"),
    ],
)
def test_labels_that_do_not_fit(entry: dict[str, Any], given_labels: Labels, message: str) -> None:
    window, composite = make_window(2, seed=0, labels=given_labels), parse_objectives([entry])
    with pytest.raises(BadInput, match=message):
        composite(window.log_probs(composite), window.batch)
