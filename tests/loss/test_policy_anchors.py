"""The formulas of reinforcement learning that people get wrong, by enumeration over a small vocabulary.

An expectation over y ~ pi is a batch of V positions, one for each y, weighted by pi(y); its sum of value *
weight has as its gradient the expected gradient.

Shape legend: V vocabulary, also as positions; S answers; T tokens.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from direct_policy import VOCABULARY, randn
from direct_signal import make_batch
from torch import Tensor

from gyrocompass.loss.advantages import flat_groups, group_advantages, leave_one_out, token_rewards
from gyrocompass.loss.divergence import Head, divergence
from gyrocompass.loss.importance import ImportanceSums, importance_sums
from gyrocompass.loss.objective import parse_objectives
from gyrocompass.loss.reduce import Reduction, normalise
from gyrocompass.loss.signal import Batch, TokenLogProbs

LOGITS_V = randn(VOCABULARY, seed=1)
LOG_REF_V = randn(VOCABULARY, seed=2).log_softmax(0)
LOG_MU_V = randn(VOCABULARY, seed=3).log_softmax(0)
ADVANTAGE_V = randn(VOCABULARY, seed=4)


def every_token(log_p_V: Tensor, **columns: Tensor) -> Batch:
    """One position for each token, weighted by how often it is drawn; each an answer of its own."""
    batch = make_batch(VOCABULARY, VOCABULARY, 0, ignored_share=0.0)
    own_V = torch.arange(VOCABULARY)
    return dataclasses.replace(
        batch, target_T=own_V, segment_T=own_V, document_T=own_V, weight_T=log_p_V.exp(), columns=columns
    )


def expected(entry: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """The expected value of an objective and its expected gradient by the logits of pi."""
    logits_V = LOGITS_V.clone().requires_grad_()
    log_pi_V = logits_V.log_softmax(0)
    composite = parse_objectives([entry])
    ((value_V, weight_V),) = composite(TokenLogProbs(log_pi_V, log_pi_V), batch).values()
    value = (value_V * weight_V).sum()
    return value.detach(), torch.autograd.grad(value, logits_V)[0]


def kl(forward: bool) -> tuple[Tensor, Tensor]:
    """KL(pi || ref), or KL(ref || pi) if forward, with its gradient by the logits of pi."""
    logits_V = LOGITS_V.clone().requires_grad_()
    log_pi_V = logits_V.log_softmax(0)
    if forward:
        value = (LOG_REF_V.exp() * (LOG_REF_V - log_pi_V)).sum()
    else:
        value = (log_pi_V.exp() * (log_pi_V - LOG_REF_V)).sum()
    return value.detach(), torch.autograd.grad(value, logits_V)[0]


def assert_close(actual: Tensor, wanted: Tensor | float | list[float]) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(wanted, dtype=torch.float64), rtol=1e-10, atol=1e-12)


# --- formula 3 ---


def per_token_blame(reduction: Reduction) -> Tensor:
    """How much each token of two wrong answers, of 2 and of 8 tokens, is pushed down."""
    batch = make_batch(10, VOCABULARY, 0, ignored_share=0.0)
    answer_T = (torch.arange(10) >= 2).long()
    batch = dataclasses.replace(
        batch,
        segment_T=answer_T,
        document_T=answer_T,
        weight_T=torch.ones(10),
        columns={"advantage": -torch.ones(10)},
    )
    logprob_T = randn(10, seed=5).requires_grad_()
    composite = parse_objectives([{"clipped_surrogate": {"old": "current"}}])
    terms = composite(TokenLogProbs(logprob_T, logprob_T), batch)
    loss = normalise(composite, [batch], reduction=reduction).loss(terms, batch).loss
    return torch.autograd.grad(loss, logprob_T)[0]


def test_formula_3_a_mean_per_sequence_favours_long_wrong_answers_and_others_do_not() -> None:
    by_sequence_T = per_token_blame(Reduction(by="sequence"))
    assert_close(by_sequence_T, [1 / 4] * 2 + [1 / 16] * 8)
    assert_close(per_token_blame(Reduction(by="token")), [1 / 10] * 10)
    longest = 8
    assert_close(per_token_blame(Reduction(by="constant", constant=2 * longest)), [1 / 16] * 10)


def test_formula_3_leave_one_out_is_the_group_mean_times_g_over_g_minus_1() -> None:
    reward_S, group_S = randn(9, seed=6), torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2])
    size_S = torch.tensor([3] * 3 + [4] * 4 + [2] * 2).double()
    assert_close(
        leave_one_out(reward_S, group_S), size_S / (size_S - 1) * group_advantages(reward_S, group_S)
    )
    for i in range(9):
        others = [j for j in range(9) if group_S[j] == group_S[i] and j != i]
        assert_close(leave_one_out(reward_S, group_S)[i], reward_S[i] - reward_S[others].mean())


def test_formula_3_no_std_unless_asked_and_flat_groups_are_reported() -> None:
    reward_S, group_S = torch.tensor([0.0, 10.0, 0.1, 0.1, 0.1]), torch.tensor([4, 4, 9, 9, 9])
    assert group_advantages(reward_S, group_S).tolist() == [-5, 5, 0, 0, 0]
    assert flat_groups(reward_S, group_S).tolist() == [9]


# --- formula 4 ---

ESTIMATES = {
    ("k1", "no"): ("reverse", "none"),
    ("k2", "no"): ("other", "reverse"),
    ("k3", "no"): ("reverse", "forward"),
    ("k1", "current"): ("reverse", "reverse"),
    ("k3", "current"): ("reverse", "reverse"),
}
"""By estimator and weight: which divergence is the value, and which has the gradient."""


@pytest.mark.parametrize("case", ESTIMATES, ids=" ".join)
def test_formula_4_what_each_estimator_of_the_kl_has_as_value_and_gradient(case: tuple[str, str]) -> None:
    estimator, weighted = case
    batch = every_token(LOGITS_V.log_softmax(0), reference_logprob=LOG_REF_V)
    value, gradient_V = expected({"reference_kl": {"estimator": estimator, "weighted": weighted}}, batch)
    of_value, of_gradient = ESTIMATES[case]
    if of_value == "reverse":
        assert_close(value, kl(forward=False)[0])
    else:
        assert abs(float(value - kl(forward=False)[0])) > 0.01
    if of_gradient == "none":
        assert_close(gradient_V, torch.zeros(VOCABULARY))
    else:
        assert_close(gradient_V, kl(forward=of_gradient == "forward")[1])
        assert (kl(forward=True)[1] - kl(forward=False)[1]).abs().max() > 0.01


def test_formula_4_the_full_divergence_has_the_value_and_gradient_of_reverse_kl() -> None:
    logits_V1 = LOGITS_V[:, None].clone().requires_grad_()
    one_11 = torch.ones(1, 1, dtype=torch.float64)
    heads = Head(one_11, logits_V1), Head(one_11, LOG_REF_V[:, None])
    (asked,) = parse_objectives([{"distillation": {"kind": "reverse_kl"}}]).divergences
    value_T = divergence(*heads, asked.kind)
    (gradient_V1,) = torch.autograd.grad(value_T.sum(), logits_V1)
    for actual, wanted in zip((value_T.detach()[0], gradient_V1[:, 0]), kl(forward=False), strict=True):
        assert_close(actual, wanted)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_formula_4_off_policy_the_ratio_to_the_sampler_restores_value_and_gradient(estimator: str) -> None:
    batch = every_token(LOG_MU_V, reference_logprob=LOG_REF_V, rollout_logprob=LOG_MU_V)
    found = expected({"reference_kl": {"estimator": estimator, "weighted": "rollout"}}, batch)
    for actual, wanted in zip(found, kl(forward=False), strict=True):
        assert_close(actual, wanted)


def test_formula_4_in_the_reward_minus_beta_l_has_the_gradient_of_beta_kl() -> None:
    beta, log_pi_V = 0.3, LOGITS_V.log_softmax(0)
    nothing_V, own_V = torch.zeros(VOCABULARY, dtype=torch.float64), torch.arange(VOCABULARY)
    reward_V = token_rewards(nothing_V, own_V, log_pi_V.requires_grad_(), LOG_REF_V, beta=beta)
    assert not reward_V.requires_grad
    _, gradient_V = expected("reinforce", every_token(log_pi_V.detach(), advantage=reward_V))
    assert_close(gradient_V, beta * kl(forward=False)[1])


# --- formula 5 ---


def policy_gradient_of_pi() -> Tensor:
    """E_{y ~ pi} of the gradient of -A log pi."""
    return expected("reinforce", every_token(LOGITS_V.log_softmax(0), advantage=ADVANTAGE_V))[1]


@pytest.mark.parametrize(
    "entry",
    [
        {"reinforce": {"samples": {"correction": {"high": 1e9}}}},
        {"reinforce": {"samples": {"correction": {"level": "sequence", "high": 1e9}}}},
        {"clipped_surrogate": {"old": "current", "samples": {"correction": {"high": 1e9}}}},
        {"clipped_surrogate": {"clip": {"low": 1.0, "high": 1e9}}},
        {"cispo": {"high": 1e9}},
    ],
    ids=str,
)
def test_formula_5_pi_over_mu_makes_samples_of_mu_those_of_pi(entry: Any) -> None:
    batch = every_token(LOG_MU_V, advantage=ADVANTAGE_V, rollout_logprob=LOG_MU_V)
    assert_close(expected(entry, batch)[1], policy_gradient_of_pi())


def test_formula_5_uncorrected_or_bounded_it_is_biased() -> None:
    batch = every_token(LOG_MU_V, advantage=ADVANTAGE_V, rollout_logprob=LOG_MU_V)
    for samples in ({}, {"correction": {"high": 1.1}}, {"correction": {"high": 1.1, "beyond": "mask"}}):
        off = expected({"reinforce": {"samples": samples}}, batch)[1] - policy_gradient_of_pi()
        assert off.abs().max() > 0.01


def test_formula_5_a_support_of_the_sampler_alone_is_off_by_the_mass_it_kept() -> None:
    """mu is pi cut to its likeliest tokens and renormalised: pi / mu is the kept mass at each of them."""
    log_pi_V = LOGITS_V.log_softmax(0)
    kept_K = log_pi_V.argsort(descending=True)[:4]
    kept_mass = log_pi_V[kept_K].exp().sum()
    log_mu_V = torch.full_like(log_pi_V, -1e3).index_copy(0, kept_K, log_pi_V[kept_K] - kept_mass.log())
    batch = every_token(log_mu_V, rollout_logprob=log_mu_V)
    sums = importance_sums(TokenLogProbs(log_pi_V, log_pi_V), batch)
    assert sums.count == len(kept_K)
    assert sums.report()["mean_gap_nats"] == pytest.approx(math.log(kept_mass))
    assert sums.weight / sums.count == pytest.approx(float(kept_mass))


def test_formula_5_a_sampler_of_another_temperature_is_another_policy() -> None:
    log_pi_V, log_mu_V = LOGITS_V.log_softmax(0), (LOGITS_V / 0.7).log_softmax(0)
    batch = every_token(log_mu_V, rollout_logprob=log_mu_V)
    at_1 = importance_sums(TokenLogProbs(log_pi_V, log_pi_V), batch).report()
    alike = importance_sums(TokenLogProbs(log_mu_V, log_mu_V), batch).report()
    assert at_1["outside_share"] > 0.5 and alike["outside_share"] == 0
    assert alike["effective_tokens"] == pytest.approx(VOCABULARY) != at_1["effective_tokens"]


def test_formula_5_effective_sample_size() -> None:
    w = [0.5, 1.0, 2.0, 0.25]
    sums = ImportanceSums(count=4, weight=sum(w), square_weight=sum(x * x for x in w))
    assert sums.report()["effective_tokens"] == pytest.approx(3.75**2 / 5.3125)
