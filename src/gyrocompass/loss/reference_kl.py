"""The distance from a reference policy as an objective, estimated by the tokens that were drawn.

With y drawn from pi, l = log pi(y) - log ref(y) estimates KL(pi || ref) in several ways, and what an
estimator has as its *value* and what its *gradient* points at are two things:

    estimator                value, expected        gradient, expected
    k1 = l                   KL(pi || ref)          0: it changes nothing
    k2 = l^2 / 2             no KL divergence       that of KL(pi || ref)
    k3 = exp(-l) - 1 + l     KL(pi || ref)          that of KL(ref || pi)
    (pi / sg pi) * k1, k3    KL(pi || ref)          that of KL(pi || ref)
    full                     KL(pi || ref)          that of KL(pi || ref)

All of it holds token by token, given what came before: that the choice of y also moves what comes after has
no part in these gradients. It has one where the distance is taken off the reward as -beta * sg(l), which
`advantages.token_rewards` does. The factor beta of an objective is its weight.

The full divergence is `distillation: {kind: reverse_kl}` with the reference as the teacher: one more pass of
the reference in each step, and no variance over y.

Where y was drawn from another policy mu, the factor is pi / mu, and the expectations are those above again.

Shape legend: T positions.
"""

from __future__ import annotations

from typing import Literal

import torch

from gyrocompass.loss.importance import complete, log_ratio, ratio
from gyrocompass.loss.registry import objective
from gyrocompass.loss.signal import Batch, Terms, TokenLogProbs


@objective(separable=True)
def reference_kl(
    log_probs: TokenLogProbs,
    batch: Batch,
    *,
    estimator: Literal["k1", "k2", "k3"] = "k3",
    weighted: Literal["no", "current", "rollout"] = "current",
    skip_truncated: bool = False,
) -> Terms:
    """The distance from the reference, estimated by the sampled tokens.

        value_t = r_t * k(l_t)        k1 = l    k2 = l^2 / 2    k3 = exp(-l) - 1 + l
        r_t = 1 (no), pi_t / sg(pi_t) (current), pi_t / mu_t (rollout); l_t = log pi_t - log ref_t

    As it stands (k3, current) its value is never negative and both its value and its gradient are those of
    KL(pi || ref) in expectation. GRPO as published is k3 unweighted, whose gradient is that of
    KL(ref || pi). What the others have is in the table of this module.

    Args:
        log_probs: pi.
        batch: with `reference_logprob`, and `rollout_logprob` if weighted by it.
        estimator: k.
        weighted: r, which has a gradient. It is not clipped.
        skip_truncated: sequences that were cut off have no weight.

    Returns:
        Terms [T] in nats.

    Raises:
        BadInput: a column that is read is missing.

    Source: Schulman 2020, "Approximating KL divergence"; the weight, DeepSeek-V3.2, arXiv:2512.02556.
    """
    batch = complete(batch, skip_truncated=skip_truncated)
    logprob_T, counted_T = log_probs.logprob_T, batch.weight_T > 0
    reference_T = batch.column("reference_logprob", counted_T).to(logprob_T.dtype)
    l_T = (logprob_T - reference_T).masked_fill(~counted_T, 0.0)
    match estimator:
        case "k1":
            value_T = l_T
        case "k2":
            value_T = l_T.square() / 2
        case "k3":
            value_T = torch.expm1(-l_T) + l_T
    if weighted != "no":
        value_T = value_T * ratio(log_ratio(log_probs, batch, weighted))
    return Terms(value_T, batch.weight_T)
