"""Objectives of single answers that are desirable or not: no pairs, a reference all the same.

    l(y) = sum_t log pi(y_t | x, y_<t) - log pi_ref(y_t | x, y_<t)        over the counted tokens of y

The label `desirable` is 1 or 0. Each returns one term per sequence. `kto` and `bco_unpaired` judge an answer
against a number that the whole window gives, so they are evaluated on the whole window; that number has no
gradient, and it does depend on what else the window holds.

Left out: BCO's density ratio between the prompts of either kind, and moving averages over windows, which need
a state in the checkpoint.

Shape legend: T positions, S sequences.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor

from gyrocompass.core.errors import BadInput
from gyrocompass.loss.preference import log_ratios
from gyrocompass.loss.registry import objective
from gyrocompass.loss.sequences import Sequences
from gyrocompass.loss.signal import Batch, Terms, TokenLogProbs


@objective(whole_window=True)
def kto(
    log_probs: TokenLogProbs,
    batch: Batch,
    *,
    beta: PositiveFloat = 0.1,
    desirable_weight: NonNegativeFloat = 1.0,
    undesirable_weight: NonNegativeFloat = 1.0,
    kl: Literal["matched", "mismatched"] = "matched",
) -> Terms:
    """Kahneman-Tversky optimisation: gains and losses against a point of reference, with losing returns.

        desirable      value_s = weight_d (1 - sigmoid(beta (l(y) - z)))
        undesirable    value_s = weight_u (1 - sigmoid(beta (z - l(y))))
        z = max(0, mean of l over the window), without gradient

    z estimates KL(policy || reference). The paper takes that mean over mismatched answers, each a prompt with
    another's answer, which are further sequences to compute: `kl: mismatched` reads them, marked by the label
    `mismatched` (1, else 0); their `desirable` is not used. The default takes it over the window's own
    answers, as BCO does: it needs no further data, and is larger where the policy has moved towards what it
    was trained on.

    The weights of desirable and undesirable multiply values, not the denominator: the mean is over sequences.

    Args:
        log_probs: any.
        batch: with the column `reference_logprob` and the label `desirable`; all sequences of the window.
        beta: how soon gains and losses saturate.
        desirable_weight: lambda_D; the paper balances it against the counts of both kinds.
        undesirable_weight: lambda_U.
        kl: which answers estimate z.

    Returns:
        Terms [S]; 1/2 times its weight where the policy is the reference.

    Raises:
        BadInput: labels that are neither 1 nor 0, or no mismatched answer to estimate from.

    Source: Ethayarajh et al. 2024, arXiv:2402.01306, equations 7 and 8.
    """
    sequences = Sequences(batch)
    ratio_S = sequences.sum(log_ratios(log_probs, batch))
    weight_S, judges_S = sequences.weight_S, torch.ones_like(sequences.weight_S)
    if kl == "mismatched":
        judges_S = _zero_or_one(sequences, "mismatched")
        weight_S = weight_S.masked_fill(judges_S == 1.0, 0.0)
        if len(sequences) and not judges_S.any():
            raise BadInput("the window has no mismatched answer", fix="set kl: matched, or mark some")
    z = _mean(ratio_S, sequences.weight_S * judges_S).clamp(min=0.0)
    wanted_S = _zero_or_one(sequences, "desirable") == 1.0
    gain_S = beta * torch.where(wanted_S, ratio_S - z, z - ratio_S)
    loss_S = torch.sigmoid(-gain_S)
    return Terms(torch.where(wanted_S, desirable_weight * loss_S, undesirable_weight * loss_S), weight_S)


@objective()
def apo_zero_unpaired(log_probs: TokenLogProbs, batch: Batch, *, beta: PositiveFloat = 0.1) -> Terms:
    """Anchored preference optimisation of single answers: KTO with its point of reference at 0.

        desirable      value_s = 1 - sigmoid(beta l(y))
        undesirable    value_s = sigmoid(beta l(y))

    Returns:
        Terms [S]; 1/2 where the policy is the reference.

    Raises:
        BadInput: labels that are neither 1 nor 0.

    Source: D'Oosterlinck et al. 2024, arXiv:2408.06266, equation 7, by sides.
    """
    sequences = Sequences(batch)
    reward_S = beta * sequences.sum(log_ratios(log_probs, batch))
    wanted_S = _zero_or_one(sequences, "desirable") == 1.0
    return Terms(torch.sigmoid(torch.where(wanted_S, -reward_S, reward_S)), sequences.weight_S)


@objective(whole_window=True)
def bco_unpaired(log_probs: TokenLogProbs, batch: Batch, *, beta: PositiveFloat = 0.1) -> Terms:
    """Binary classifier optimisation: desirable answers are 1, undesirable ones 0.

        desirable      value_s = -log sigmoid(r - delta)        r = beta l(y)
        undesirable    value_s = -log sigmoid(-(r - delta))
        delta = 1/2 (mean of r over desirable answers + mean of r over undesirable ones), without gradient

    The paper's delta is a moving average over batches, this one the window's. A kind that the window lacks
    has mean 0. The mean is over all sequences, where the paper adds the means of both kinds.

    Returns:
        Terms [S]; ln 2 where the policy is the reference.

    Raises:
        BadInput: labels that are neither 1 nor 0.

    Source: Jung et al. 2024, arXiv:2404.04656.
    """
    sequences = Sequences(batch)
    reward_S = beta * sequences.sum(log_ratios(log_probs, batch))
    desirable_S = _zero_or_one(sequences, "desirable")
    means = [_mean(reward_S, sequences.weight_S * kind_S) for kind_S in (desirable_S, 1.0 - desirable_S)]
    shifted_S = reward_S - 0.5 * (means[0] + means[1])
    return Terms(-F.logsigmoid(torch.where(desirable_S == 1.0, shifted_S, -shifted_S)), sequences.weight_S)


def _mean(values_S: Tensor, weight_S: Tensor) -> Tensor:
    """The weighted mean, without gradient; 0 where nothing has a weight."""
    weight_S = weight_S.to(values_S.dtype)
    total = weight_S.sum()
    return (values_S.detach() * weight_S).sum() / torch.where(total > 0, total, 1.0)


def _zero_or_one(sequences: Sequences, name: str) -> Tensor:
    """A label that is 1 or 0, [S]."""
    label_S = sequences.label(name)
    wrong_S = (label_S != 0.0) & (label_S != 1.0)
    if wrong_S.any():
        found = float(label_S[wrong_S][0])
        raise BadInput(f"the label {name!r} is {found} in {int(wrong_S.sum())} sequences; it must be 1 or 0")
    return label_S
