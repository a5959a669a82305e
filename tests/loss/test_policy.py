"""Objectives of reinforcement learning: their formulas, law 1, the limits that theory gives, bad input.

Shape legend: T tokens, N counted tokens.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from direct_policy import (
    VOCABULARY,
    Formula,
    Model,
    clipped,
    corrected,
    estimated,
    gamma_weight,
    of_sequence,
    on_policy_only,
    policy_gradient,
    read,
    rollouts,
    soft_gate,
    squared_error,
    taken,
    truncated_weight,
    undecided_only,
)
from direct_signal import make_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gyrocompass.core.errors import BadInput, ConfigError
from gyrocompass.loss import advantages, policy, policy_value, reference_kl
from gyrocompass.loss.importance import Clip, Correction, Samples
from gyrocompass.loss.objective import parse_objectives
from gyrocompass.loss.policy import cispo, clipped_surrogate, sapo, sequence_surrogate, vespo
from gyrocompass.loss.reduce import Reduction, normalise
from gyrocompass.loss.registry import OBJECTIVES
from gyrocompass.loss.signal import IGNORE_INDEX, Batch, TokenLogProbs

N_TOKENS = 12
SKIP = {"skip_truncated": True}
BY_TOKEN, BY_SEQUENCE = Reduction(by="token"), Reduction(by="sequence")


def sampled(**correction: Any) -> dict[str, Any]:
    return {"samples": {"correction": correction}}


CASES: dict[str, tuple[dict[str, dict[str, Any]], Formula]] = {
    "reinforce": ({"reinforce": {}}, policy_gradient),
    "reinforce_complete": ({"reinforce": {"samples": SKIP}}, policy_gradient),
    "truncated": (
        {"reinforce": sampled(low=0.8, high=1.2)},
        corrected("token", "truncate", 0.8, 1.2),
    ),
    "masked": (
        {"reinforce": sampled(beyond="mask", low=0.8, high=1.2)},
        corrected("token", "mask", 0.8, 1.2),
    ),
    "truncated_sequence": (
        {"reinforce": sampled(level="sequence", high=1.5)},
        corrected("sequence", "truncate", 0.0, 1.5),
    ),
    "masked_sequence": (
        {"reinforce": sampled(level="sequence", beyond="mask", low=0.5, high=1.5)},
        corrected("sequence", "mask", 0.5, 1.5),
    ),
    "on_policy_only": (
        {"reinforce": {"samples": {"off_policy_limit": 0.05}}},
        on_policy_only(0.05, policy_gradient),
    ),
    "limited_correction": (
        {"reinforce": {"samples": {"off_policy_limit": 0.05, "correction": {"high": 1.2}}}},
        on_policy_only(0.05, corrected("token", "truncate", 0.0, 1.2)),
    ),
    "ppo": ({"clipped_surrogate": {}}, clipped(0.2, 0.2)),
    "dapo": ({"clipped_surrogate": {"clip": {"low": 0.1, "high": 0.3}, "samples": SKIP}}, clipped(0.1, 0.3)),
    "dual": ({"clipped_surrogate": {"clip": {"high": 0.1, "dual": 1.3}}}, clipped(0.2, 0.1, 1.3)),
    "undecided": (
        {"high_entropy_surrogate": {"share": 0.4, "samples": SKIP}},
        undecided_only(0.4, clipped(0.2, 0.2)),
    ),
    "gspo": ({"sequence_surrogate": {"clip": {"low": 0.1, "high": 0.1}}}, of_sequence(0.1, 0.1)),
    "gspo_token": (
        {"sequence_surrogate": {"gradient": "token", "clip": {"low": 0.1, "high": 0.1}}},
        of_sequence(0.1, 0.1, tokenwise=True),
    ),
    "luspo": ({"sequence_surrogate": {"length_scaled": True}}, of_sequence(3e-4, 4e-4, scaled=True)),
    "cispo": ({"cispo": {"low": 0.5, "high": 1.3}}, truncated_weight(0.5, 1.3)),
    "sapo": ({"sapo": {"temperature_negative": 2.0}}, soft_gate(1.0, 2.0)),
    "vespo": ({"vespo": {}}, gamma_weight((2.0, 3.0), (3.0, 2.0))),
    "value": ({"value_loss": {}}, squared_error(0.2)),
    "value_complete": ({"value_loss": SKIP}, squared_error(0.2)),
    "value_unclipped": ({"value_loss": {"clip": None}}, squared_error(None)),
    "kl_complete": ({"reference_kl": SKIP}, estimated("k3", "current")),
} | {
    f"{estimator}_{weighted}": (
        {"reference_kl": {"estimator": estimator, "weighted": weighted}},
        estimated(estimator, weighted),
    )
    for estimator in ("k1", "k2", "k3")
    for weighted in ("no", "current", "rollout")
}


@pytest.mark.parametrize("name", CASES)
@settings(deadline=None, max_examples=4)
@given(seed=st.integers(0, 2**20))
def test_objective_is_its_formula(name: str, seed: int) -> None:
    """Each value, and the gradients of their weighted sum; skipped answers have no weight."""
    entry, formula = CASES[name]
    (parameters,) = entry.values()
    skip = parameters == SKIP or parameters.get("samples") == SKIP
    composite, batch, model = parse_objectives([entry]), rollouts(N_TOKENS, seed), Model(N_TOKENS, seed)
    ((value_T, weight_T),) = composite(model.answer(composite, batch), batch).values()
    found = [(t, formula(token)) for t, token in read(model, batch, skip_truncated=skip)]
    places = [t for t, _ in found]
    assert (weight_T > 0).nonzero()[:, 0].tolist() == places
    assert torch.equal(weight_T[places], batch.weight_T[places])
    values = torch.stack([value for _, value in found]) if found else value_T.new_zeros(0)
    torch.testing.assert_close(value_T[places], values, rtol=1e-9, atol=1e-9)
    totals = ((value_T * weight_T).sum(), (values * batch.weight_T[places]).sum())
    for ours, theirs in zip(*(gradients(total, model) for total in totals), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


def gradients(loss: Tensor, model: Model) -> list[Tensor]:
    """By the hidden states, the head and the value head; 0 where the loss does not depend on them."""
    parameters = model.parameters
    if not loss.requires_grad:
        return [torch.zeros_like(parameter) for parameter in parameters]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [
        torch.zeros_like(parameter) if gradient is None else gradient
        for parameter, gradient in zip(parameters, found, strict=True)
    ]


def test_every_objective_has_a_case() -> None:
    modules = {module.__name__ for module in (policy, policy_value, reference_kl)}
    ours = {name for name, registered in OBJECTIVES.items() if registered.function.__module__ in modules}
    assert {name for entry, _ in CASES.values() for name in entry} == ours


# --- law 1 ---

REDUCTIONS = [BY_TOKEN, BY_SEQUENCE, Reduction(by="constant", constant=50.0)]


def window_results(
    entries: list[Any], reduction: Reduction, seed: int, split: list[list[int]]
) -> list[Tensor]:
    """The loss of a window and its gradients, added up over micro-batches."""
    composite, window, model = parse_objectives(entries), rollouts(24, seed), Model(24, seed)
    batches = [taken(window, torch.tensor(part, dtype=torch.int64)) for part in split]
    normaliser = normalise(composite, batches, reduction=reduction)
    loss = torch.zeros(())
    for batch, part in zip(batches, split, strict=True):
        answer = model.answer(composite, batch, torch.tensor(part, dtype=torch.int64))
        loss = loss + normaliser.loss(composite(answer, batch), batch).loss
    return [loss, *gradients(loss, model)]


@pytest.mark.parametrize("reduction", REDUCTIONS, ids=lambda reduction: reduction.by)
@settings(deadline=None, max_examples=5)
@given(data=st.data())
def test_partition(reduction: Reduction, data: st.DataObject) -> None:
    """Answers in any order, over any micro-batches, with padding between: for each objective."""
    seed = data.draw(st.integers(0, 2**20))
    segment_T = rollouts(24, seed).segment_T.tolist()
    segments = data.draw(st.permutations(sorted(set(segment_T))))
    n_parts = data.draw(st.integers(1, 3))
    split: list[list[int]] = [[] for _ in range(n_parts)]
    for segment in segments:
        padding = [-1] * data.draw(st.integers(0, 2))
        places = [t for t, own in enumerate(segment_T) if own == segment]
        split[data.draw(st.integers(0, n_parts - 1))] += places + padding
    together = [[part for parts in split for part in parts]]
    for whole_window, parts in ((False, split), (True, together)):
        entries = [
            {objective: {"name": name, "weight": 1 + place / 10, **options}}
            for place, (name, (entry, _)) in enumerate(CASES.items())
            for objective, options in entry.items()
            if OBJECTIVES[objective].whole_window == whole_window
        ]
        expected = window_results(entries, reduction, seed, [list(range(24))])
        for ours, theirs in zip(window_results(entries, reduction, seed, parts), expected, strict=True):
            scale = max(theirs.abs().max().item(), 1e-3)
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10 * scale)


# --- limits ---

ON_POLICY = ["clipped_surrogate", "cispo", "sapo", "sequence_surrogate", "vespo", "high_entropy_surrogate"]


def one_loss(entry: Any, model: Model, batch: Batch, reduction: Reduction = BY_SEQUENCE) -> Tensor:
    composite = parse_objectives([entry])
    normaliser = normalise(composite, [batch], reduction=reduction)
    return normaliser.loss(composite(model.answer(composite, batch), batch), batch).loss


def of_answers(batch: Batch) -> Batch:
    """The same rollouts with one advantage for the whole of each answer, and weights of 1."""
    first_T = torch.searchsorted(batch.segment_T, batch.segment_T)
    columns = {**batch.columns, "advantage": batch.columns["advantage"][first_T]}
    return dataclasses.replace(batch, columns=columns, weight_T=(batch.weight_T > 0).float())


@pytest.mark.parametrize("old", ["current", "rollout"])
@pytest.mark.parametrize("name", ON_POLICY)
def test_one_policy_step_has_ratio_1(name: str, old: str) -> None:
    """Samples of the learner itself: every gradient is that of REINFORCE."""
    spread = 1.0 if old == "current" else 0.0
    batch, model = of_answers(rollouts(30, 5, spread=spread)), Model(30, 5)
    options: dict[str, Any] = {"old": old}
    if name == "vespo":
        batch, options = of_answers(rollouts(30, 5, spread=0.0)), {}
    if name == "high_entropy_surrogate":
        options["share"] = 1.0
    expected = gradients(one_loss("reinforce", model, batch), model)
    for ours, theirs in zip(gradients(one_loss({name: options}, model, batch), model), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["reinforce", *ON_POLICY])
def test_a_group_with_equal_rewards_gives_exactly_zero_gradient(name: str) -> None:
    batch, model = rollouts(30, 6), Model(30, 6)
    n_answers = int(batch.document_T.max()) + 1
    reward_S, group_S = torch.full((n_answers,), 0.1), torch.arange(n_answers) % 2
    for scale in ("none", "group", "batch"):
        advantage_S = advantages.group_advantages(reward_S, group_S, scale=scale)  # type: ignore[arg-type]
        columns = {**batch.columns, "advantage": advantage_S[batch.document_T]}
        loss = one_loss(name, model, dataclasses.replace(batch, columns=columns))
        assert loss == 0 and all((gradient == 0).all() for gradient in gradients(loss, model))


@pytest.mark.parametrize("name", [name for name in CASES if name.endswith("complete") or name == "dapo"])
def test_truncated_and_masked_tokens_give_exactly_no_gradient(name: str) -> None:
    """By whatever stands in their columns, and with or without them in the batch."""
    entry, _ = CASES[name]
    batch, model = rollouts(40, 7), Model(40, 7)
    truncated_T = (batch.document_T % 4 == 3) & (batch.weight_T > 0)
    assert truncated_T.any()
    loss = one_loss(entry, model, batch)
    nothing_T = truncated_T | (batch.weight_T == 0)
    assert (gradients(loss, model)[0][nothing_T] == 0).all()
    wild = {n: c.masked_fill(truncated_T, math.nan) for n, c in batch.columns.items() if n != "truncated"}
    wild_batch = dataclasses.replace(batch, columns={**batch.columns, **wild})
    assert torch.equal(one_loss(entry, model, wild_batch), loss)
    weight_T = batch.weight_T.masked_fill(truncated_T, 0.0)
    target_T = batch.target_T.masked_fill(truncated_T, IGNORE_INDEX)
    without = dataclasses.replace(batch, weight_T=weight_T, target_T=target_T)
    torch.testing.assert_close(one_loss(entry, model, without), loss, rtol=1e-12, atol=0)


def test_kl_of_a_model_with_itself_is_0() -> None:
    batch, model = rollouts(30, 8), Model(30, 8)
    own = {**batch.columns, "reference_logprob": model.logprob_T(batch).detach()}
    for estimator in ("k1", "k2", "k3"):
        entry = {"reference_kl": {"estimator": estimator, "weighted": "no"}}
        assert abs(float(one_loss(entry, model, dataclasses.replace(batch, columns=own)).detach())) < 1e-15


def test_a_clip_stops_the_gradient_outside_and_only_there() -> None:
    """Formula 4's clamp, on ratios at and around both bounds, and beyond what can be written."""
    gaps = torch.tensor([-500.0, -0.5, 0.0, 0.5, 500.0])
    clip = Clip(low=0.2, high=0.2, dual=3.0)
    for sign, moves in ((1.0, [1, 1, 1, 0, 0]), (-1.0, [0, 0, 1, 1, 0])):
        batch = make_batch(5, VOCABULARY, 0, ignored_share=0.0)
        columns = {"advantage": torch.full((5,), sign), "rollout_logprob": -600.0 * torch.ones(5)}
        batch = dataclasses.replace(batch, columns=columns)
        logprob_T = (gaps - 600.0).requires_grad_()
        value_T, _ = clipped_surrogate(TokenLogProbs(logprob_T, logprob_T), batch, clip=clip)
        (gradient_T,) = torch.autograd.grad(value_T.sum(), logprob_T)
        expected_T = -sign * gaps.exp() * torch.tensor(moves) if sign > 0 else None
        assert value_T.isfinite().all() and gradient_T.isfinite().all()
        assert ((gradient_T != 0) <= torch.tensor(moves, dtype=torch.bool)).all()
        if expected_T is not None:
            torch.testing.assert_close(gradient_T, torch.nan_to_num(expected_T))


def test_what_is_over_a_whole_window_says_so() -> None:
    assert OBJECTIVES["high_entropy_surrogate"].whole_window
    assert not any(OBJECTIVES[name].whole_window for name in ("clipped_surrogate", "vespo", "value_loss"))


# --- bad input ---


@pytest.mark.parametrize(
    ("entry", "column"),
    [
        ("reinforce", "advantage"),
        ("clipped_surrogate", "rollout_logprob"),
        ("vespo", "rollout_logprob"),
        ({"reinforce": {"samples": SKIP}}, "truncated"),
        ({"reinforce": {"samples": {"correction": {}}}}, "rollout_logprob"),
        ("value_loss", "return"),
        ("value_loss", "value"),
        ("reference_kl", "reference_logprob"),
        ({"reference_kl": SKIP}, "truncated"),
    ],
)
def test_a_missing_column_is_named(entry: Any, column: str) -> None:
    batch, composite = rollouts(N_TOKENS, 1), parse_objectives([entry])
    others = {name: values_T for name, values_T in batch.columns.items() if name != column}
    answer = Model(N_TOKENS, 1).answer(composite, batch)
    with pytest.raises(BadInput, match=f"no column '{column}'") as raised:
        composite(answer, dataclasses.replace(batch, columns=others))
    assert (raised.value.fix is not None and "train on rollouts" in raised.value.fix) or column.startswith(
        "ref"
    )


def test_old_current_needs_no_recorded_log_probabilities() -> None:
    batch = rollouts(N_TOKENS, 1)
    batch = dataclasses.replace(batch, columns={"advantage": batch.columns["advantage"]})
    answer = Model(N_TOKENS, 1).answer(parse_objectives(["reinforce"]), batch)
    for found in (
        clipped_surrogate(answer, batch, old="current"),
        sequence_surrogate(answer, batch, old="current"),
        cispo(answer, batch, old="current"),
        sapo(answer, batch, old="current"),
    ):
        assert found.value.shape == (N_TOKENS,)


@pytest.mark.parametrize("objective", [clipped_surrogate, sequence_surrogate, cispo, sapo, vespo])
def test_the_sampler_is_not_corrected_for_twice(objective: Any) -> None:
    batch = rollouts(N_TOKENS, 1)
    answer = Model(N_TOKENS, 1).answer(parse_objectives(["reinforce"]), batch)
    with pytest.raises(BadInput, match="to the sampler already"):
        objective(answer, batch, samples=Samples(correction=Correction()))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"clipped_surrogate": {"clip": {"dual": 1.1}}}, "above 1 . high"),
        ({"clipped_surrogate": {"clip": {"low": 1.5}}}, "less than or equal to 1"),
        ({"reinforce": {"samples": {"correction": {"low": 3.0}}}}, "below high"),
        ({"reinforce": {"samples": {"off_policy_limit": 0}}}, "greater than 0"),
        ({"sapo": {"temperature_positive": 0}}, "greater than 0"),
        ({"high_entropy_surrogate": {"share": 0}}, "greater than 0"),
        ({"reference_kl": {"estimator": "k4"}}, "k4"),
    ],
)
def test_parameters_are_bounded(entry: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_objectives([entry])


def test_the_bounds_of_cispo_are_in_order() -> None:
    batch = rollouts(N_TOKENS, 1)
    answer = Model(N_TOKENS, 1).answer(parse_objectives(["reinforce"]), batch)
    with pytest.raises(BadInput, match="low is 3"):
        cispo(answer, batch, low=3.0, high=1.0)


def test_nothing_counted_is_a_differentiable_0() -> None:
    batch, model = rollouts(6, 1, ignored_share=1.0), Model(6, 1)
    for entry, _ in CASES.values():
        loss = one_loss(entry, model, batch)
        assert loss == 0 and all((gradient == 0).all() for gradient in gradients(loss, model))
