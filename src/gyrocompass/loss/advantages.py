"""From rewards to advantages: how much better than expected each answer, or each token of it, was.

    rewards of S answers in groups (samples of one prompt)   --group_advantages, leave_one_out-->  [S]
    rewards and values of T tokens                           --generalised_advantages----------->  [T], [T]

Pure functions of tensors, run once over all the samples of a step, before these are packed and split. No
gradient goes through any of them. Rewards are checked here: a reward that is no finite number is an error
that names it, never a 0.

A group whose rewards are all equal has the advantage 0 exactly, whatever it is scaled by, and so no gradient;
`flat_groups` names these groups, since a run where most are flat learns little.

Left out: bootstrapping of answers that were cut off (a sequence ends with the value 0).

Shape legend: S sequences (answers), T counted tokens, in order within each sequence.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from gyrocompass.core.errors import BadInput


def group_advantages(
    reward_S: Tensor, group_S: Tensor, *, scale: Literal["none", "group", "batch"] = "none", eps: float = 1e-4
) -> Tensor:
    """Each reward against the mean of its group.

        A_i = (r_i - mean(r of its group)) / (std + eps)        without scale: no division

    std is that of a sample (n - 1), of the group or of all rewards. Dividing by a group's own std weighs up
    the prompts that are nearly always or nearly never solved; that of the batch, or none, does not.

    Args:
        reward_S: r, floating.
        group_S: int64: which group each is of, in any order.
        scale: "group" is GRPO as published, "none" Dr. GRPO, "batch" the std of all rewards.
        eps: what keeps the quotient finite.

    Returns:
        A, like the rewards.

    Raises:
        BadInput: a reward is not finite, or a group has one answer only.

    >>> group_advantages(torch.tensor([1.0, 0.0, 3.0, 3.0]), torch.tensor([0, 0, 7, 7])).tolist()
    [0.5, -0.5, 0.0, 0.0]

    Source: Shao et al. 2024, arXiv:2402.03300; Liu et al. 2025, arXiv:2503.20783 (no std).
    """
    groups = _Groups.of(reward_S, group_S)
    centred_S = reward_S - groups.mean_G.to(reward_S.dtype)[groups.index_S]
    centred_S = centred_S.masked_fill(groups.is_flat_G[groups.index_S], 0.0)
    if scale == "none" or not len(reward_S):
        return centred_S
    if scale == "batch":
        return centred_S / (reward_S.std() + eps)
    square_G = torch.zeros_like(groups.mean_G).index_add(0, groups.index_S, centred_S.double().square())
    std_G = (square_G / (groups.size_G - 1)).sqrt()
    return centred_S / (std_G.to(reward_S.dtype)[groups.index_S] + eps)


def leave_one_out(reward_S: Tensor, group_S: Tensor) -> Tensor:
    """Each reward against the mean of the others of its group (RLOO).

        A_i = r_i - 1/(G-1) sum_{j != i} r_j = G/(G-1) (r_i - mean(r))

    The baseline does not depend on the answer itself, so the policy gradient stays unbiased; that of
    `group_advantages` is the same but for the factor.

    Args:
        reward_S: r, floating.
        group_S: int64: which group each is of.

    Returns:
        A, like the rewards.

    Raises:
        BadInput: a reward is not finite, or a group has one answer only.

    >>> leave_one_out(torch.tensor([1.0, 0.0]), torch.tensor([0, 0])).tolist()
    [1.0, -1.0]

    Source: Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free!"; Ahmadian et al. 2024,
    arXiv:2402.14740.
    """
    groups = _Groups.of(reward_S, group_S)
    size_S = groups.size_G[groups.index_S].to(reward_S.dtype)
    return size_S / (size_S - 1) * group_advantages(reward_S, group_S)


def against_baseline(reward_S: Tensor, baseline_S: Tensor | float) -> Tensor:
    """REINFORCE with a baseline: A_i = r_i - b_i.

    Args:
        reward_S: r.
        baseline_S: b, a number or one per answer; unbiased if it does not depend on the answer.

    Raises:
        BadInput: a reward or a baseline is not finite.

    >>> against_baseline(torch.tensor([1.0, 0.0]), 0.25).tolist()
    [0.75, -0.25]
    """
    _check_finite("reward", reward_S)
    if isinstance(baseline_S, Tensor):
        _check_like("baseline", baseline_S, reward_S)
        _check_finite("baseline", baseline_S)
        baseline_S = baseline_S.detach()
    return reward_S.detach() - baseline_S


def flat_groups(reward_S: Tensor, group_S: Tensor) -> Tensor:
    """The groups whose rewards are all equal, int64: they teach nothing, and their share is worth reporting.

    Raises:
        BadInput: a reward is not finite, or a group has one answer only.

    >>> flat_groups(torch.tensor([1.0, 0.0, 3.0, 3.0]), torch.tensor([0, 0, 7, 7])).tolist()
    [7]
    """
    groups = _Groups.of(reward_S, group_S)
    return groups.key_G[groups.is_flat_G]


def token_rewards(
    reward_S: Tensor,
    sequence_T: Tensor,
    logprob_T: Tensor,
    reference_logprob_T: Tensor,
    *,
    beta: float,
) -> Tensor:
    """The reward of each token: the answer's at its last one, less the distance from the reference at each.

        R_t = [t is the last of its answer] r - beta * sg(log pi_t - log ref_t)

    In the reward, the distance has the gradient of beta KL(pi || ref) of whole answers, tokens to come
    included. Summed over each answer it is the reward of RLOO with the KL in the reward.

    Args:
        reward_S: r of each answer.
        sequence_T: int64: which answer (0 .. S - 1) each token is of.
        logprob_T: log pi of each token; its gradient is stopped.
        reference_logprob_T: log ref.
        beta: what a nat of distance costs.

    Returns:
        R, like logprob_T.

    Raises:
        BadInput: a number is not finite, or an answer has no token.

    >>> logprob_T, reference_logprob_T = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -2.0])
    >>> token_rewards(
    ...     torch.tensor([3.0]), torch.tensor([0, 0]), logprob_T, reference_logprob_T, beta=0.5
    ... ).tolist()
    [-0.25, 3.0]

    Source: Stiennon et al. 2020, arXiv:2009.01325.
    """
    _check_finite("reward", reward_S)
    for name, values_T in (
        ("log-probability", logprob_T),
        ("reference log-probability", reference_logprob_T),
    ):
        _check_like(name, values_T, sequence_T)
        _check_finite(name, values_T)
    last_S = torch.full((len(reward_S),), -1, dtype=torch.int64, device=sequence_T.device)
    place_T = torch.arange(len(sequence_T), device=sequence_T.device)
    last_S = last_S.scatter_reduce(0, sequence_T, place_T, "amax")
    if (last_S < 0).any():
        raise BadInput(f"answer number {int((last_S < 0).nonzero()[0])} has no token")
    shaped_T = -beta * (logprob_T - reference_logprob_T).detach()
    return shaped_T.index_add(0, last_S, reward_S.to(shaped_T.dtype))


def generalised_advantages(
    reward_T: Tensor, value_T: Tensor, sequence_T: Tensor, *, gamma: float = 1.0, lambda_: float = 0.95
) -> tuple[Tensor, Tensor]:
    """GAE: advantages of tokens, and the returns that a value head learns.

        delta_t = R_t + gamma V_{t+1} - V_t            V after the last token of a sequence is 0
        A_t = delta_t + gamma lambda A_{t+1}           return_t = A_t + V_t

    With values of 0 and lambda 1 both are the discounted rewards to go. Tokens of sequences may alternate;
    what is before and after is said by their order within each.

    Args:
        reward_T: R, such as `token_rewards`.
        value_T: V where token t is about to be chosen.
        sequence_T: int64: which sequence each token is of.
        gamma: how much less a later reward is worth, per token; in [0, 1].
        lambda_: 0 trusts the values (little variance), 1 the rewards (no bias); in [0, 1].

    Returns:
        (A, return), like the rewards.

    Raises:
        BadInput: a number is not finite, or gamma or lambda out of range.

    >>> reward_T, value_T, sequence_T = torch.tensor([0.0, 0.0, 1.0]), torch.zeros(3), torch.zeros(3).long()
    >>> generalised_advantages(reward_T, value_T, sequence_T, gamma=0.5, lambda_=1.0)[0].tolist()
    [0.25, 0.5, 1.0]

    Source: Schulman et al. 2015, arXiv:1506.02438.
    """
    for name, number in (("gamma", gamma), ("lambda", lambda_)):
        if not 0.0 <= number <= 1.0:
            raise BadInput(f"{name} is {number}; it must be from 0 to 1")
    for name, values_T in (("reward", reward_T), ("value", value_T)):
        _check_like(name, values_T, sequence_T)
        _check_finite(name, values_T)
    following: dict[int, tuple[float, float]] = {}
    advantages: list[float] = []
    rows = zip(reward_T.tolist(), value_T.tolist(), sequence_T.tolist(), strict=True)
    for reward, value, sequence in reversed(list(rows)):
        next_value, next_advantage = following.get(sequence, (0.0, 0.0))
        advantage = reward + gamma * next_value - value + gamma * lambda_ * next_advantage
        following[sequence] = (value, advantage)
        advantages.append(advantage)
    advantage_T = torch.tensor(advantages[::-1], dtype=reward_T.dtype, device=reward_T.device)
    return advantage_T, advantage_T + value_T.detach().to(reward_T.dtype)


def whiten(advantage_T: Tensor, *, centre: bool = True, eps: float = 1e-8) -> Tensor:
    """Advantages with mean 0 and variance 1 over all of them.

        (A - mean(A)) / sqrt(var(A) + eps)              var divides by n

    Args:
        advantage_T: of counted tokens only, of all the samples of a step: whitened part by part they would
            depend on how the step is split.
        centre: False keeps the mean, and with it the sign of each advantage.
        eps: what keeps the quotient finite.

    Returns:
        Like the advantages; if all are equal, 0 exactly, or with `centre` off as they were.

    Raises:
        BadInput: an advantage is not finite.

    >>> whiten(torch.tensor([1.0, 3.0])).tolist()
    [-1.0, 1.0]

    Source: Andrychowicz et al. 2021, arXiv:2006.05990.
    """
    _check_finite("advantage", advantage_T)
    advantage_T = advantage_T.detach()
    if not len(advantage_T) or (advantage_T == advantage_T[0]).all():
        return torch.zeros_like(advantage_T) if centre else advantage_T
    centred_T = advantage_T - advantage_T.mean()
    scale = (centred_T.square().mean() + eps).sqrt()
    return (centred_T if centre else advantage_T) / scale


class _Groups(NamedTuple):
    """The groups of a batch of rewards, in order of their keys; G of them."""

    key_G: Tensor
    index_S: Tensor
    size_G: Tensor
    mean_G: Tensor
    """float64."""
    is_flat_G: Tensor

    @classmethod
    def of(cls, reward_S: Tensor, group_S: Tensor) -> _Groups:
        """Group rewards, after a look at both."""
        _check_finite("reward", reward_S)
        _check_like("group", group_S, reward_S)
        key_G, index_S, size_G = torch.unique(group_S, return_inverse=True, return_counts=True)
        if (size_G < 2).any():
            raise BadInput(
                f"group {int(key_G[size_G < 2][0])} has one answer, which cannot be compared with others",
                fix="draw at least two answers for each prompt",
            )
        zero_G = torch.zeros(len(key_G), dtype=torch.float64, device=reward_S.device)
        mean_G = zero_G.index_add(0, index_S, reward_S.detach().double()) / size_G
        high_G, low_G = (
            zero_G.scatter_reduce(0, index_S, reward_S.detach().double(), kind, include_self=False)
            for kind in ("amax", "amin")
        )
        return cls(key_G, index_S, size_G, mean_G, high_G == low_G)


def _check_finite(name: str, values: Tensor) -> None:
    """Raise BadInput at the first number that is none."""
    wrong = (~values.isfinite()).nonzero()
    if len(wrong):
        raise BadInput(
            f"{name} number {int(wrong[0])} is {float(values[wrong[0]])}", fix="give finite numbers"
        )


def _check_like(name: str, values: Tensor, other: Tensor) -> None:
    if values.dim() != 1 or values.shape != other.shape:
        raise BadInput(f"{name}: {list(values.shape)} numbers where {list(other.shape)} are needed")
