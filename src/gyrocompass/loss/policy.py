"""Objectives of reinforcement learning on sampled text: pure functions from log-probabilities to terms.

Each returns one term per token, unreduced: minus what is to be gained, which training lowers. With A_t the
column `advantage` (see `advantages.py`), r_t = pi / old the ratio of the learner to the old policy (see
`importance.py`, which says what is old), and sg(x) x with its gradient stopped:

    reinforce            -A_t log pi_t
    clipped_surrogate    -min(r_t A_t, clip(r_t) A_t)                      PPO, GRPO, Dr. GRPO, DAPO
    sequence_surrogate   the same with r the geometric mean over a sequence     GSPO, GSPO-token, LUSPO
    cispo                -sg(clip(r_t)) A_t log pi_t
    sapo                 -gate(r_t) A_t
    vespo                -sg(phi(w)) A_t log pi_t       w = pi / mu of the whole sequence

What a term is divided by is the reduction's choice, and makes the published normalisations:

    GRPO, GSPO, SAPO       by: sequence    the mean over sequences of each one's mean over tokens
    DAPO, CISPO, VESPO     by: token       the sum over all tokens of the window / their number
    BNPO                   by: token       the same, of one micro-batch; here always of the window (law 1)
    Dr. GRPO               by: constant    the sum / constant: sequences in a window * tokens of the longest
    LUSPO                  by: sequence    with `length_scaled`

By sequence, a long wrong answer is blamed less per token than a short one. A sequence without weight is in no
mean: published code that counts it (in the number of sequences) gives less for the same batch.

What the model decides (a correction, a clip, a mask by entropy or by distance from the sampler) is in the
value, what the batch decides (truncated answers) in the weight. A masked token thus stays in the denominator.

Left out: an entropy bonus (`confidence_penalty` is one), the distance to a reference (`reference_kl.py`), the
value head's loss (`policy_value.py`), and whatever turns rewards into advantages (`advantages.py`).

Shape legend: T positions.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor

from gyrocompass.core.errors import BadInput
from gyrocompass.loss.importance import (
    Clip,
    Old,
    Samples,
    complete,
    log_ratio,
    ratio,
    refuse_double_correction,
    stopped_factor,
)
from gyrocompass.loss.registry import objective
from gyrocompass.loss.sequences import Sequences
from gyrocompass.loss.signal import Batch, Terms, TokenLogProbs

AS_DRAWN = Samples()
CLIP = Clip()
SEQUENCE_CLIP = Clip(low=3e-4, high=4e-4)
"""The ratio of a sequence is a mean, so it stays much nearer to 1."""
OpenShare = Annotated[float, Field(gt=0.0, le=1.0)]


@objective(separable=True)
def reinforce(log_probs: TokenLogProbs, batch: Batch, *, samples: Samples = AS_DRAWN) -> Terms:
    """The policy gradient: raises the log-probability of what was better than expected.

        value_t = -A_t log pi_t

    The value itself says little; its gradient is minus that of the expected reward if A is (a reward minus
    anything that does not depend on the tokens from t on).

    Args:
        log_probs: pi.
        batch: with `advantage`.
        samples: corrections and masks.

    Returns:
        Terms [T].

    Raises:
        BadInput: a column that is read is missing.

    Source: Williams 1992, "Simple statistical gradient-following algorithms"; for text with leave-one-out
    baselines, Ahmadian et al. 2024, arXiv:2402.14740 (RLOO).
    """
    batch, advantage_T = _read(log_probs, batch, samples)
    return _terms(advantage_T * log_probs.logprob_T, advantage_T, log_probs, batch, samples)


@objective(separable=True)
def clipped_surrogate(
    log_probs: TokenLogProbs,
    batch: Batch,
    *,
    clip: Clip = CLIP,
    old: Old = "rollout",
    samples: Samples = AS_DRAWN,
) -> Terms:
    """The surrogate of PPO: the ratio of each token, held near 1 where the advantage pushes it away.

        value_t = -min(r_t A_t, clip(r_t, 1 - low, 1 + high) A_t)           r_t = pi_t / old_t

    With `dual`, where A_t < 0 it is at most -dual A_t: the ratio counts up to `dual` only.

    Args:
        log_probs: pi.
        batch: with `advantage`, and `rollout_logprob` unless nothing reads it.
        clip: low and high apart are DAPO's clip-higher; dual is the two-sided clip.
        old: what r is the ratio to. `current` makes it 1, and the gradient that of `reinforce`.
        samples: corrections and masks.

    Returns:
        Terms [T].

    Raises:
        BadInput: a column that is read is missing; a correction with `old: rollout`.

    Source: Schulman et al. 2017, arXiv:1707.06347 (PPO); Shao et al. 2024, arXiv:2402.03300 (GRPO); Liu et
    al. 2025, arXiv:2503.20783 (Dr. GRPO); Yu et al. 2025, arXiv:2503.14476 (DAPO); the dual clip, Ye et al.
    2020, arXiv:1912.09729, and INTELLECT-2, arXiv:2505.07291.
    """
    refuse_double_correction(old, samples)
    batch, advantage_T = _read(log_probs, batch, samples)
    gain_T = _clipped(ratio(log_ratio(log_probs, batch, old)), advantage_T, clip)
    return _terms(gain_T, advantage_T, log_probs, batch, samples)


@objective(wants=("entropy",), whole_window=True)
def high_entropy_surrogate(
    log_probs: TokenLogProbs,
    batch: Batch,
    *,
    share: OpenShare = 0.2,
    clip: Clip = CLIP,
    old: Old = "rollout",
    samples: Samples = AS_DRAWN,
) -> Terms:
    """`clipped_surrogate` of the tokens where the learner was least decided; of others the value is 0.

        value_t = [H_t >= tau] * clipped_surrogate_t         H_t = -sum_v p_v log p_v

    tau is the (1 - share) quantile of H over all counted tokens of the window (of all its micro-batches and
    ranks), interpolated linearly. The tokens below stay in the denominator of a mean by token.

    Args:
        log_probs: pi, with entropy_T; no gradient goes through it.
        batch: as for `clipped_surrogate`.
        share: of the tokens, how many are kept.
        clip: as for `clipped_surrogate`.
        old: as for `clipped_surrogate`.
        samples: as for `clipped_surrogate`; skipped sequences are not in the quantile.

    Returns:
        Terms [T].

    Raises:
        BadInput: as for `clipped_surrogate`.

    Source: Wang et al. 2025, arXiv:2506.01939.
    """
    assert log_probs.entropy_T is not None
    value_T, weight_T = clipped_surrogate(log_probs, batch, clip=clip, old=old, samples=samples)
    entropy_T, counted_T = log_probs.entropy_T.detach(), weight_T > 0
    if not counted_T.any():
        return Terms(value_T, weight_T)
    threshold = torch.quantile(entropy_T[counted_T], 1 - share)
    return Terms(value_T.masked_fill(entropy_T < threshold, 0.0), weight_T)


@objective()
def sequence_surrogate(
    log_probs: TokenLogProbs,
    batch: Batch,
    *,
    clip: Clip = SEQUENCE_CLIP,
    gradient: Literal["sequence", "token"] = "sequence",
    length_scaled: bool = False,
    old: Old = "rollout",
    samples: Samples = AS_DRAWN,
) -> Terms:
    """The clipped surrogate of whole sequences: one ratio for all tokens of an answer.

        value_t = -min(s_t A_t, clip(s_t, 1 - low, 1 + high) A_t)
        s_t = exp(1/n sum_u log(pi_u / old_u))              gradient: sequence (GSPO); u over its n tokens
        s_t = sg(s) * pi_t / sg(pi_t)                       gradient: token (GSPO-token)

    Both have the same value. Where all tokens of a sequence have one advantage, its mean also has the same
    gradient; only the second lets advantages differ from token to token. With `length_scaled`, times n.

    Args:
        log_probs: pi.
        batch: as for `clipped_surrogate`.
        clip: of s.
        gradient: which of the two.
        length_scaled: multiplies by the length of the sequence: reduced by sequence, this is LUSPO.
        old: what s is the ratio to.
        samples: corrections and masks.

    Returns:
        Terms [T]: the value of a sequence at each of its tokens, so by sequence it counts once.

    Raises:
        BadInput: as for `clipped_surrogate`.

    Source: Zheng et al. 2025, arXiv:2507.18071 (GSPO); LUSPO, arXiv:2602.05261.
    """
    refuse_double_correction(old, samples)
    batch, advantage_T = _read(log_probs, batch, samples)
    sequences = Sequences(batch)
    mean_T = sequences.spread(sequences.mean(log_ratio(log_probs, batch, old)))
    if gradient == "token":
        mean_T = mean_T.detach() + log_probs.logprob_T - log_probs.logprob_T.detach()
    gain_T = _clipped(ratio(mean_T), advantage_T, clip)
    if length_scaled:
        gain_T = gain_T * sequences.spread(sequences.length_S).to(gain_T.dtype)
    return _terms(gain_T, advantage_T, log_probs, batch, samples)


@objective(separable=True)
def cispo(
    log_probs: TokenLogProbs,
    batch: Batch,
    *,
    low: NonNegativeFloat = 0.0,
    high: PositiveFloat = 5.0,
    old: Old = "rollout",
    samples: Samples = AS_DRAWN,
) -> Terms:
    """The policy gradient with truncated importance weights: no token's gradient is stopped.

        value_t = -sg(clip(r_t, low, high)) A_t log pi_t                    r_t = pi_t / old_t

    Args:
        log_probs: pi.
        batch: as for `clipped_surrogate`.
        low: the smallest weight. (The paper's 1 - epsilon_low; it uses no lower bound.)
        high: the largest weight. (The paper's 1 + epsilon_high; ScaleRL's and TRL's epsilon_high itself.)
        old: what r is the ratio to.
        samples: corrections and masks.

    Returns:
        Terms [T].

    Raises:
        BadInput: as for `clipped_surrogate`; `low` above `high`.

    Source: MiniMax-M1, arXiv:2506.13585; ScaleRL, arXiv:2510.13786.
    """
    if low > high:
        raise BadInput(f"low is {low} and high {high}", fix="give the smallest weight as low")
    refuse_double_correction(old, samples)
    batch, advantage_T = _read(log_probs, batch, samples)
    weight_T = ratio(log_ratio(log_probs, batch, old).detach()).clamp(low, high)
    return _terms(weight_T * advantage_T * log_probs.logprob_T, advantage_T, log_probs, batch, samples)


@objective(separable=True)
def sapo(
    log_probs: TokenLogProbs,
    batch: Batch,
    *,
    temperature_positive: PositiveFloat = 1.0,
    temperature_negative: PositiveFloat = 1.05,
    old: Old = "rollout",
    samples: Samples = AS_DRAWN,
) -> Terms:
    """A surrogate with a soft gate where PPO clips: the further the ratio is from 1, the less it matters.

        value_t = -4/tau sigmoid(tau (r_t - 1)) A_t        tau = that of the sign of A_t; r_t = pi_t / old_t

    At r = 1 the gradient is that of `reinforce`.

    Args:
        log_probs: pi.
        batch: as for `clipped_surrogate`.
        temperature_positive: tau where A_t > 0.
        temperature_negative: tau elsewhere; larger closes the gate sooner.
        old: what r is the ratio to.
        samples: corrections and masks.

    Returns:
        Terms [T].

    Raises:
        BadInput: as for `clipped_surrogate`.

    Source: Soft Adaptive Policy Optimization, arXiv:2511.20347.
    """
    refuse_double_correction(old, samples)
    batch, advantage_T = _read(log_probs, batch, samples)
    tau_T = torch.full_like(advantage_T, temperature_negative).masked_fill(
        advantage_T > 0, temperature_positive
    )
    gate_T = torch.sigmoid(tau_T * (ratio(log_ratio(log_probs, batch, old)) - 1)) * 4 / tau_T
    return _terms(gate_T * advantage_T, advantage_T, log_probs, batch, samples)


@objective()
def vespo(
    log_probs: TokenLogProbs,
    batch: Batch,
    *,
    power_positive: NonNegativeFloat = 2.0,
    decay_positive: PositiveFloat = 3.0,
    power_negative: NonNegativeFloat = 3.0,
    decay_negative: PositiveFloat = 2.0,
    samples: Samples = AS_DRAWN,
) -> Terms:
    """The policy gradient with a smooth weight of the whole sequence's ratio to the sampler.

        value_t = -sg(phi(w)) A_t log pi_t                  w = exp(sum_u log(pi_u / mu_u)), not a mean
        phi(w) = w^k exp(lambda (1 - w))                    phi(1) = 1; k and lambda those of the sign of A_t

    Args:
        log_probs: pi.
        batch: with `advantage` and `rollout_logprob`.
        power_positive: k where A_t >= 0: how fast samples that became unlikely lose weight.
        decay_positive: lambda where A_t >= 0: how fast samples that became likely do.
        power_negative: k elsewhere.
        decay_negative: lambda elsewhere.
        samples: masks; a correction is refused, since w is the ratio to the sampler.

    Returns:
        Terms [T].

    Raises:
        BadInput: a column that is read is missing; a correction.

    Source: Variational Sequence-Level Soft Policy Optimization, arXiv:2602.10693.
    """
    refuse_double_correction("rollout", samples)
    batch, advantage_T = _read(log_probs, batch, samples)
    sequences = Sequences(batch)
    log_w_T = sequences.spread(sequences.sum(log_ratio(log_probs, batch, "rollout").detach()))
    negative_T = advantage_T < 0
    power_T = torch.full_like(log_w_T, power_positive).masked_fill(negative_T, power_negative)
    decay_T = torch.full_like(log_w_T, decay_positive).masked_fill(negative_T, decay_negative)
    phi_T = (power_T * log_w_T + decay_T * (1 - log_w_T.exp())).exp()
    return _terms(phi_T * advantage_T * log_probs.logprob_T, advantage_T, log_probs, batch, samples)


def _read(log_probs: TokenLogProbs, batch: Batch, samples: Samples) -> tuple[Batch, Tensor]:
    """The samples that count, and their advantages in the dtype of the log-probabilities, 0 elsewhere."""
    batch = complete(batch, skip_truncated=samples.skip_truncated)
    return batch, batch.column("advantage", batch.weight_T > 0).to(log_probs.logprob_T.dtype)


def _clipped(ratio_T: Tensor, advantage_T: Tensor, clip: Clip) -> Tensor:
    """min(r A, clip(r) A), and where A < 0 at least dual A: what is to be gained."""
    near_T = ratio_T.clamp(1 - clip.low, 1 + clip.high)
    gain_T = torch.minimum(ratio_T * advantage_T, near_T * advantage_T)
    if clip.dual is None:
        return gain_T
    return torch.where(advantage_T < 0, torch.maximum(gain_T, clip.dual * advantage_T), gain_T)


def _terms(
    gain_T: Tensor, advantage_T: Tensor, log_probs: TokenLogProbs, batch: Batch, samples: Samples
) -> Terms:
    """Minus the gain, as far as the samples count."""
    factor_T = stopped_factor(log_probs, batch, samples, advantage_T)
    return Terms(-gain_T * factor_T, batch.weight_T)
