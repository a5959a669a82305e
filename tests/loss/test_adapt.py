"""Adaptive weights: each controller against its published formula, and what it does in the end."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from direct_signal import make_batch
from hypothesis import given, settings
from hypothesis import strategies as st

from gyrocompass.core.config import parse
from gyrocompass.core.errors import BadInput, ConfigError
from gyrocompass.loss.adapt import Observed
from gyrocompass.loss.blend import Blend, BlendConfig
from gyrocompass.loss.logprob import token_logprobs
from gyrocompass.loss.objective import Composite, parse_objectives
from gyrocompass.loss.reduce import normalise
from gyrocompass.loss.registry import OBJECTIVES, objective
from gyrocompass.loss.sequences import Pairs, Sequences
from gyrocompass.loss.signal import Batch, Terms, TokenLogProbs

OBJECTIVE = parse_objectives(["nll", {"focal": {"weight": 0.5}}, "z_loss"])
SLICES = ("code", "prose")
positive = st.floats(0.01, 20.0)


def blend_of(config: dict[str, Any], objective: Composite = OBJECTIVE) -> Blend:
    return Blend(parse(BlendConfig, config), objective, SLICES)


def seen(
    means: dict[str, float],
    norms: dict[str, float] | None = None,
    excess: dict[str, float] | None = None,
) -> Observed:
    return Observed(means, norms or {}, excess or {})


# --- each against its formula ---


def test_without_a_config_the_weights_are_those_of_the_entries() -> None:
    blend = Blend(None, parse_objectives(["nll", {"focal": {"weight": 0.5}}]), None)
    blend.observe(0, seen({"nll": 3.0, "focal": 2.0}))
    assert blend.weights(1) == ({"nll": 1.0, "focal": 0.5}, {})
    assert blend.state() == []


@given(st.lists(positive, min_size=1, max_size=4), st.floats(0.01, 0.2))
@settings(deadline=None, max_examples=20)
def test_uncertainty_descends_the_gradient_of_its_formula(losses: list[float], rate: float) -> None:
    blend = blend_of({"uncertainty": {"rate": rate, "objectives": ["nll", "focal"]}})
    s = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    for step, loss in enumerate(losses):
        both = torch.tensor([loss, 1.0], dtype=torch.float64)
        (slope,) = torch.autograd.grad((torch.exp(-s) * both + s / 2).sum(), s)
        s = (s - rate * slope).clamp(-8.0, 8.0).detach().requires_grad_()
        blend.observe(step, seen({"nll": loss, "focal": 1.0, "z_loss": 9.0}))
    nll, focal = torch.exp(-s).tolist()
    assert blend.weights(9).objectives == pytest.approx({"nll": nll, "focal": 0.5 * focal, "z_loss": 1.0})


def test_uncertainty_rests_at_the_inverse_of_twice_the_loss() -> None:
    blend = blend_of({"uncertainty": {"rate": 0.2, "objectives": ["nll", "focal"]}})
    for step in range(400):
        blend.observe(step, seen({"nll": 4.0, "focal": 0.1}))
    weights = blend.weights(400).objectives
    assert (weights["nll"], weights["focal"] / 0.5) == (pytest.approx(1 / 8), pytest.approx(5.0))


def test_gradnorm_descends_the_gradient_of_its_formula() -> None:
    """The published loss, with G's mean as its unit, by autograd."""
    alpha, rate = 0.7, 0.05
    blend = blend_of(
        {"gradnorm": {"alpha": alpha, "rate": rate, "every_steps": 2, "objectives": ["nll", "focal"]}}
    )
    first, f = np.array([4.0, 2.0]), torch.ones(2, dtype=torch.float64)
    rows = [((4.0, 2.0), (0.3, 0.1)), ((3.0, 1.9), (0.2, 0.1)), ((1.0, 1.8), (0.1, 0.4))]
    for nth, (losses, norms) in enumerate(rows):
        assert blend.reads_gradient_norms(2 * nth) and not blend.reads_gradient_norms(2 * nth + 1)
        f.requires_grad_()
        g, ratio = torch.tensor(norms, dtype=torch.float64), torch.from_numpy(np.array(losses) / first)
        mean = (f * g).mean().detach()
        distance = (f * g - mean * (ratio / ratio.mean()) ** alpha).abs().sum() / mean
        (slope,) = torch.autograd.grad(distance, f)
        f = (f - rate * slope).detach()
        f = 2 * f / f.sum()
        named = (dict(zip(("nll", "focal"), row, strict=True)) for row in (losses, norms))
        blend.observe(2 * nth, seen(*named))
        blend.observe(2 * nth + 1, seen({"nll": 99.0, "focal": 0.5}))  # not measured: nothing moves
    weights = blend.weights(6).objectives
    assert [weights["nll"], weights["focal"] / 0.5] == pytest.approx(f.tolist(), rel=1e-12)
    assert weights["z_loss"] == 1.0


def test_gradnorm_makes_norms_equal_where_alpha_is_0() -> None:
    blend = blend_of({"gradnorm": {"alpha": 0.0, "every_steps": 1, "objectives": ["nll", "focal"]}})
    for step in range(300):
        blend.observe(step, seen({"nll": 1.0, "focal": 1.0}, {"nll": 3.0, "focal": 1.0}))
    weights = blend.weights(300).objectives
    assert 3.0 * weights["nll"] == pytest.approx(weights["focal"] / 0.5, rel=0.1)


def test_dwa_compares_the_means_of_two_periods() -> None:
    blend = blend_of({"dwa": {"temperature": 2.0, "every_steps": 2, "objectives": ["nll", "focal"]}})
    rows = [(4.0, 1.0), (2.0, 3.0), (2.0, 2.0), (1.0, 2.0)]
    for step, (nll, focal) in enumerate(rows):
        assert blend.weights(step).objectives == {"nll": 1.0, "focal": 0.5, "z_loss": 1.0}
        blend.observe(step, seen({"nll": nll, "focal": focal}))
    pull = np.exp(np.array([1.5 / 3.0, 2.0 / 2.0]) / 2.0)
    expected = 2 * pull / pull.sum()
    weights = blend.weights(4).objectives
    assert [weights["nll"], weights["focal"] / 0.5] == pytest.approx(expected.tolist(), rel=1e-12)


def test_a_loss_that_a_window_lacks_moves_nothing() -> None:
    for way in (
        {"uncertainty": {}},
        {"gradnorm": {"every_steps": 1}},
        {"lagrangian": {"objective": "nll", "bound": 1}},
        {"dwa": {"every_steps": 1}},
    ):
        blend = blend_of(way)
        before = blend.weights(0)
        blend.observe(0, seen({}))
        assert blend.weights(1) == before


def test_the_multiplier_ascends_and_is_clipped() -> None:
    config = {"objective": "focal", "bound": 0.5, "reference": 1.0, "rate": 0.5, "initial": 1.0, "maximum": 2}
    blend = blend_of({"lagrangian": config})
    multipliers = []
    for step, loss in enumerate([2.0, 2.5, 5.0, 1.0, -9.0, 1.6]):
        blend.observe(step, seen({"nll": 1.0, "focal": loss}))
        multipliers.append(blend.weights(step).objectives["focal"] / 0.5)
    assert multipliers == pytest.approx([1.25, 1.75, 2.0, 1.75, 0.0, 0.05])


@pytest.mark.parametrize(("bound", "multiplier"), [(0.25, 1.0), (1.0, 0.0), (4.0, 0.0)])
def test_dual_ascent_finds_the_constrained_minimum(bound: float, multiplier: float) -> None:
    """Minimise (x - 1)^2 where x^2 <= bound: x = min(1, sqrt(bound)), and 1 / sqrt(bound) - 1 or 0."""
    blend = blend_of({"lagrangian": {"objective": "nll", "bound": bound, "rate": 0.2, "initial": 0.3}})
    x = 0.0
    for step in range(3000):
        weight = blend.weights(step).objectives["nll"]
        x -= 0.05 * (2 * (x - 1) + weight * 2 * x)
        blend.observe(step, seen({"nll": x * x}))
    assert x == pytest.approx(min(1.0, math.sqrt(bound)), abs=1e-3)
    assert blend.weights(0).objectives["nll"] == pytest.approx(multiplier, abs=1e-2)


@given(st.lists(st.tuples(positive, positive), min_size=1, max_size=5), st.floats(0.01, 2.0))
@settings(deadline=None, max_examples=20)
def test_doremi_is_its_formula(rows: list[tuple[float, float]], rate: float) -> None:
    blend = blend_of({"doremi": {"rate": rate, "smoothing": 0.1}})
    a = np.array([0.5, 0.5])
    for step, row in enumerate(rows):
        blend.observe(step, seen({}, excess=dict(zip(SLICES, row, strict=True))))
        a = a * np.exp(rate * np.array(row))
        a = 0.9 * a / a.sum() + 0.1 / 2
    weights = blend.weights(9)
    assert list(weights.slices.values()) == pytest.approx((2 * a).tolist(), rel=1e-9)
    assert weights.objectives == OBJECTIVE.weights(9)


def test_doremi_keeps_the_last_excess_of_a_slice_that_a_window_lacks() -> None:
    there, lacking = blend_of({"doremi": {}}), blend_of({"doremi": {}})
    for step, prose in enumerate([{"prose": 0.7}, {}]):
        there.observe(step, seen({}, excess={"code": 0.2, "prose": 0.7}))
        lacking.observe(step, seen({}, excess={"code": 0.2, **prose}))
    assert lacking.weights(2) == there.weights(2)


# --- state ---

WAYS: list[dict[str, Any]] = [
    {"uncertainty": {}},
    {"gradnorm": {"every_steps": 2}},
    {"dwa": {"every_steps": 2}},
    {"lagrangian": {"objective": "nll", "bound": 0.5}, "doremi": {}},
]


@pytest.mark.parametrize("config", WAYS, ids=lambda config: next(iter(config)))
def test_a_restored_blend_goes_on_identically(config: dict[str, Any]) -> None:
    random = np.random.default_rng(0)

    def observed() -> Observed:
        means, norms = (dict(zip(OBJECTIVE.names, random.random(3).tolist(), strict=True)) for _ in range(2))
        return seen(means, norms, dict(zip(SLICES, random.random(2).tolist(), strict=True)))

    whole, rows = blend_of(config), [observed() for _ in range(9)]
    for step, row in enumerate(rows[:5]):
        whole.observe(step, row)
    resumed = blend_of(config)
    resumed.restore(json.loads(json.dumps(whole.state())))
    for step, row in enumerate(rows[5:], start=5):
        whole.observe(step, row)
        resumed.observe(step, row)
        assert resumed.weights(step) == whole.weights(step)
    assert resumed.state() == whole.state() and whole.weights(0) != blend_of(config).weights(0)


# --- objectives of some slices ---


def test_an_objective_of_some_slices_counts_their_tokens_alone() -> None:
    batch = make_batch(60, 9, seed=3)
    entries = ["nll", {"nll": {"name": "some", "slices": ["a", "c"]}}, {"focal": {"slices": ["nowhere"]}}]
    composite = parse_objectives(entries).on_slices(("a", "b", "c"))
    h_TD, w_VD = torch.randn(60, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    terms = composite(token_logprobs(h_TD, w_VD, batch.target_T), batch)
    assert torch.equal(terms["some"].weight, batch.weight_T * (batch.slice_T != 1))
    assert torch.equal(terms["nll"].weight, batch.weight_T)
    assert not terms["focal"].weight.any()
    loss = normalise(composite, [batch], {"nll": 0.0, "some": 1.0, "focal": 1.0}).share(terms, batch)
    own_T = batch.weight_T.double() * (batch.slice_T != 1)
    torch.testing.assert_close(loss, (own_T * terms["nll"].value).sum() / own_T.sum(), rtol=1e-6, atol=0)


def test_candidates_outside_the_slices_are_not_asked_for() -> None:
    batch = make_batch(20, 9, seed=1)
    entry = {"unlikelihood": {"window": 0, "tokens": [1, 2], "slices": ["b"]}}
    candidate_TC = parse_objectives([entry]).on_slices(("a", "b", "c")).candidates(batch)
    assert candidate_TC is not None
    assert (candidate_TC[batch.slice_T != 1] == -100).all() and (candidate_TC[batch.slice_T == 1] >= 0).any()


def test_pairs_of_other_slices_are_left_out_and_a_pair_across_slices_is_refused() -> None:
    def preference(log_probs: TokenLogProbs, batch: Batch) -> Terms:
        pairs = Pairs(Sequences(batch))
        chosen_P, rejected_P = pairs.sides(pairs.sequences.sum(log_probs.logprob_T))
        return Terms(rejected_P - chosen_P, pairs.weight_P)

    number_T = torch.arange(8) // 2  # four sequences of two tokens, two pairs
    batch = Batch(
        **dict.fromkeys(("token_T", "target_T", "position_T", "source_T", "byte_T"), torch.arange(8)),
        segment_T=number_T,
        document_T=number_T,
        slice_T=number_T // 2,
        unit_T=number_T // 2,
        weight_T=torch.ones(8),
        length=8,
        columns={"side": 1.0 - number_T % 2},
    )
    log_probs = TokenLogProbs(logprob_T=torch.arange(8.0), lse_T=torch.zeros(8))
    objective()(preference)
    try:
        composite = parse_objectives([{"preference": {"slices": ["b"]}}])
        value, weight = composite.on_slices(("a", "b"))(log_probs, batch)["preference"]
        assert value.tolist() == [(6 + 7) - (4 + 5)] and weight.tolist() == [1.0]
        across = Batch(**{**vars(batch), "slice_T": number_T % 2})
        with pytest.raises(BadInput, match="not pairs"):
            composite.on_slices(("a", "b"))(log_probs, across)
    finally:
        del OBJECTIVES["preference"]


def test_excess_nll_is_the_difference_and_has_the_gradient_of_nll() -> None:
    batch = make_batch(12, 9, seed=5)
    reference_T = torch.where(batch.weight_T > 0, -1.5, torch.nan)
    batch = Batch(**{**vars(batch), "columns": {"reference_logprob": reference_T}})
    h_TD, w_VD = torch.randn(12, 4, dtype=torch.float64, requires_grad=True), torch.randn(9, 4).double()
    composite = parse_objectives(["excess_nll", "nll"])
    terms = composite(token_logprobs(h_TD, w_VD, batch.target_T), batch)
    counted_T = batch.weight_T > 0
    excess_T, nll_T = terms["excess_nll"].value[counted_T], terms["nll"].value[counted_T]
    torch.testing.assert_close(excess_T, nll_T - 1.5, rtol=1e-12, atol=0)
    slopes = [torch.autograd.grad(value_T.sum(), h_TD, retain_graph=True)[0] for value_T in (excess_T, nll_T)]
    assert torch.equal(*slopes)


# --- what does not fit ---


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "without `blend` weights are fixed"),
        ({"uncertainty": {}, "dwa": {}}, "one way, not by uncertainty and dwa"),
        ({"gradnrm": {}}, r"gradnrm: unknown key; did you mean gradnorm\?"),
        ({"gradnorm": {"alpha": -1}}, "greater than or equal to 0"),
        ({"dwa": {"temperature": 0}}, "greater than 0"),
        ({"lagrangian": {"objective": "nll"}}, "the key bound is missing"),
        ({"lagrangian": {"objective": "nll", "bound": 1, "initial": 200}}, "above maximum"),
        ({"doremi": {"smoothing": 0.0}}, "greater than 0"),
        ({"lagrangian": {"objective": "nl", "bound": 1}}, r"no objective nl; did you mean nll\?"),
        ({"dwa": {"objectives": ["nll"]}}, "at least two, each once"),
        ({"dwa": {"objectives": ["nll", "nll"]}}, "at least two, each once"),
    ],
)
def test_a_mistake_is_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        blend_of(config)


def test_a_lagrangian_needs_something_to_minimise() -> None:
    with pytest.raises(ConfigError, match="at least two"):
        blend_of({"lagrangian": {"objective": "nll", "bound": 1}}, parse_objectives(["nll"]))


@pytest.mark.parametrize("way", ["uncertainty", "gradnorm", "dwa"])
def test_ratios_and_variances_of_negative_losses_are_refused(way: str) -> None:
    blend = blend_of({way: {} if way == "uncertainty" else {"every_steps": 1}})
    norms = dict.fromkeys(OBJECTIVE.names, 1.0)
    with pytest.raises(BadInput, match=f"{way} cannot weigh the objective focal, whose mean is -0.5"):
        blend.observe(0, seen({"nll": 1.0, "focal": -0.5, "z_loss": 1.0}, norms))


def test_doremi_needs_slices() -> None:
    with pytest.raises(BadInput, match="slices of a data set"):
        Blend(parse(BlendConfig, {"doremi": {}}), OBJECTIVE, None)


def test_unknown_and_empty_slices_are_refused() -> None:
    composite = parse_objectives([{"nll": {"slices": ["prose/doc"]}}])
    with pytest.raises(BadInput, match=r"nll is about the slice prose/doc, .*; did you mean prose/docs\?"):
        composite.within({"data": ("code", "prose/docs")})
    with pytest.raises(ConfigError, match="slices"):
        parse_objectives([{"nll": {"slices": []}}])
