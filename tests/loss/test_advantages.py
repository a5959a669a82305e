"""From rewards to advantages: the formulas by plain loops, TRL's numbers, and what is refused.

Shape legend: S answers, T tokens.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from direct_policy import randn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gyrocompass.core.errors import BadInput
from gyrocompass.loss.advantages import (
    against_baseline,
    flat_groups,
    generalised_advantages,
    group_advantages,
    leave_one_out,
    token_rewards,
    whiten,
)


@st.composite
def groups(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Rewards in groups of at least two, in any order; some groups are flat."""
    sizes = draw(st.lists(st.integers(2, 5), min_size=1, max_size=4))
    members = [
        (10 * g, draw(st.sampled_from([0.0, 0.1, 1 / 3, 1.0]))) for g, n in enumerate(sizes) for _ in range(n)
    ]
    members = draw(st.permutations(members))
    reward_S = torch.tensor([reward for _, reward in members], dtype=torch.float64)
    return reward_S, torch.tensor([group for group, _ in members])


@settings(deadline=None, max_examples=40)
@given(drawn=groups())
def test_groups_are_their_formulas(drawn: tuple[Tensor, Tensor]) -> None:
    reward_S, group_S = drawn
    rewards, keys = reward_S.tolist(), group_S.tolist()
    own = [[r for r, key in zip(rewards, keys, strict=True) if key == mine] for mine in keys]
    centred = [r - statistics.fmean(group) for r, group in zip(rewards, own, strict=True)]
    expected = {
        "none": centred,
        "group": [c / (statistics.stdev(group) + 1e-4) for c, group in zip(centred, own, strict=True)],
        "batch": [c / (statistics.stdev(rewards) + 1e-4) for c in centred],
    }
    for scale, wanted in expected.items():
        found_S = group_advantages(reward_S, group_S, scale=scale)  # type: ignore[arg-type]
        assert found_S.tolist() == pytest.approx(wanted, abs=1e-12)
        flat = [len(set(group)) == 1 for group in own]
        assert all(a == 0 for a, is_flat in zip(found_S.tolist(), flat, strict=True) if is_flat)
    left_out = [r - (sum(group) - r) / (len(group) - 1) for r, group in zip(rewards, own, strict=True)]
    assert leave_one_out(reward_S, group_S).tolist() == pytest.approx(left_out, abs=1e-12)
    flat_keys = {key for key, group in zip(keys, own, strict=True) if len(set(group)) == 1}
    assert flat_groups(reward_S, group_S).tolist() == sorted(flat_keys)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_are_exactly_0_even_where_their_mean_is_rounded(dtype: torch.dtype) -> None:
    reward_S, group_S = torch.full((3,), 0.1, dtype=dtype), torch.zeros(3, dtype=torch.int64)
    for scale in ("none", "group", "batch"):
        found_S = group_advantages(reward_S, group_S, scale=scale)  # type: ignore[arg-type]
        assert found_S.dtype == dtype and (found_S == 0).all()
    assert (leave_one_out(reward_S, group_S) == 0).all()


def gae_by_definition(
    rewards: list[float], values: list[float], gamma: float, lambda_: float
) -> tuple[list[float], list[float]]:
    """The double sum over later temporal differences."""
    n = len(rewards)
    after = [*values[1:], 0.0]
    delta = [rewards[t] + gamma * after[t] - values[t] for t in range(n)]
    advantage = [sum((gamma * lambda_) ** (u - t) * delta[u] for u in range(t, n)) for t in range(n)]
    return advantage, [a + v for a, v in zip(advantage, values, strict=True)]


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**20),
    gamma=st.sampled_from([0.0, 0.9, 1.0]),
    lambda_=st.sampled_from([0.0, 0.95, 1.0]),
)
def test_gae_is_its_definition_and_sequences_may_alternate(seed: int, gamma: float, lambda_: float) -> None:
    reward_T, value_T = randn(2, 11, seed=seed)
    sequence_T = torch.randint(3, (11,), generator=torch.Generator().manual_seed(seed))
    found = generalised_advantages(reward_T, value_T, sequence_T, gamma=gamma, lambda_=lambda_)
    for sequence in sequence_T.unique():
        at_T = sequence_T == sequence
        expected = gae_by_definition(reward_T[at_T].tolist(), value_T[at_T].tolist(), gamma, lambda_)
        for ours_T, wanted in zip(found, expected, strict=True):
            assert ours_T[at_T].tolist() == pytest.approx(wanted, abs=1e-12)


def test_without_values_the_advantage_is_the_reward_to_go() -> None:
    reward_T, sequence_T = randn(6, seed=1), torch.tensor([0, 0, 0, 1, 1, 1])
    advantage_T, return_T = generalised_advantages(
        reward_T, torch.zeros_like(reward_T), sequence_T, lambda_=1.0
    )
    to_go = [float(reward_T[t : 3 * (t // 3) + 3].sum()) for t in range(6)]
    assert advantage_T.tolist() == pytest.approx(to_go) and torch.equal(advantage_T, return_T)


def test_perfect_values_leave_no_advantage() -> None:
    reward_T, sequence_T = randn(5, seed=2), torch.zeros(5, dtype=torch.int64)
    value_T = reward_T.flip(0).cumsum(0).flip(0)
    for lambda_ in (0.0, 0.5, 1.0):
        advantage_T, return_T = generalised_advantages(reward_T, value_T, sequence_T, lambda_=lambda_)
        torch.testing.assert_close(advantage_T, torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-12)
        torch.testing.assert_close(return_T, value_T)


def test_token_rewards_end_with_the_answers_reward_and_cost_each_nat() -> None:
    logprob_T, reference_T = randn(2, 5, seed=3)
    reward_S, sequence_T = torch.tensor([2.0, -1.0]), torch.tensor([0, 1, 0, 1, 1])
    found_T = token_rewards(reward_S, sequence_T, logprob_T.requires_grad_(), reference_T, beta=0.5)
    apart_T = 0.5 * (logprob_T.detach() - reference_T)
    ends_T = torch.tensor([0.0, 0.0, 2.0, 0.0, -1.0])
    torch.testing.assert_close(found_T, ends_T - apart_T)
    assert not found_T.requires_grad
    assert torch.equal(token_rewards(reward_S, sequence_T, logprob_T, reference_T, beta=0.0), ends_T.double())


def test_whitened_advantages_have_mean_0_and_variance_1() -> None:
    advantage_T = 3 * randn(200, seed=4) + 7
    white_T = whiten(advantage_T)
    assert abs(float(white_T.mean())) < 1e-12 and float(white_T.square().mean()) == pytest.approx(1)
    kept_T = whiten(advantage_T, centre=False)
    torch.testing.assert_close(kept_T - kept_T.mean(), white_T)
    flat_T = torch.full((3,), 0.1)
    assert torch.equal(whiten(flat_T), torch.zeros(3)) and torch.equal(whiten(flat_T, centre=False), flat_T)
    assert whiten(torch.zeros(0)).shape == (0,)


def test_a_baseline_is_taken_off() -> None:
    reward_S = torch.tensor([1.0, 0.0, 3.0])
    assert against_baseline(reward_S, 1.0).tolist() == [0, -1, 2]
    baseline_S = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    found_S = against_baseline(reward_S, baseline_S)
    assert found_S.tolist() == [0, -2, 0] and not found_S.requires_grad


def test_no_rewards_are_no_advantages() -> None:
    nothing_S, no_group_S = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    for scale in ("none", "group", "batch"):
        assert group_advantages(nothing_S, no_group_S, scale=scale).shape == (0,)  # type: ignore[arg-type]
    assert leave_one_out(nothing_S, no_group_S).shape == flat_groups(nothing_S, no_group_S).shape == (0,)


TWO = torch.tensor([0, 0])
GROUPED: list[Callable[[Tensor, Tensor], Tensor]] = [group_advantages, leave_one_out, flat_groups]


@pytest.mark.parametrize("function", GROUPED)
@pytest.mark.parametrize(
    ("rewards", "group_S", "message"),
    [
        ([1.0, math.nan], TWO, "reward number 1 is nan"),
        ([math.inf, 1.0], TWO, "reward number 0 is inf"),
        ([1.0, 2.0, 3.0], torch.tensor([5, 8, 5]), "group 8 has one answer"),
        ([1.0, 2.0, 3.0], TWO, "2. numbers where .3. are needed"),
    ],
)
def test_bad_rewards_and_groups_are_named(
    function: Callable[..., Any], rewards: list[float], group_S: Tensor, message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        function(torch.tensor(rewards), group_S)


def test_bad_tokens_are_named() -> None:
    bad_T, good_T = torch.tensor([0.0, math.nan]), torch.zeros(2)
    with pytest.raises(BadInput, match="value number 1 is nan"):
        generalised_advantages(good_T, bad_T, TWO)
    with pytest.raises(BadInput, match="reward number 1 is nan"):
        generalised_advantages(bad_T, good_T, TWO)
    with pytest.raises(BadInput, match=r"gamma is 1\.5"):
        generalised_advantages(good_T, good_T, TWO, gamma=1.5)
    with pytest.raises(BadInput, match="advantage number 1 is nan"):
        whiten(bad_T)
    with pytest.raises(BadInput, match="baseline number 1 is nan"):
        against_baseline(good_T, bad_T)
    with pytest.raises(BadInput, match="reference log-probability number 1 is nan"):
        token_rewards(torch.ones(1), TWO, good_T, bad_T, beta=0.1)
    with pytest.raises(BadInput, match="answer number 1 has no token"):
        token_rewards(torch.ones(2), TWO, good_T, good_T, beta=0.1)
