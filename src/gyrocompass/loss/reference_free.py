"""Objectives of pairs that need no reference: the policy's own log-probabilities are the scores.

    L(y) = sum_t log pi(y_t | x, y_<t)        m(y) = L(y) / |y|        over the counted tokens of y

What keeps such a policy from drifting is a term of supervised learning. It is an entry of its own beside the
preference, with a weight, since it is a mean of tokens and the preference one of pairs:

    CPO     - cpo                               ORPO    - orpo: {weight: 0.1}
            - chosen_nll: {weight: 1.0}                 - chosen_nll

(ORPO's published NLL includes the prompt; here the prompt counts if the data says so.) `tpo` alone has its
own, about a third answer. Each returns one term per pair, in the order of `Pairs`, weighted by the chosen
side.

Shape legend: T positions, S sequences, P pairs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor

from gyrocompass.core.errors import BadInput
from gyrocompass.loss.likelihood import log1mexp
from gyrocompass.loss.margin import Doubt, pair_loss
from gyrocompass.loss.registry import objective
from gyrocompass.loss.sequences import Pairs, Sequences
from gyrocompass.loss.signal import Batch, Terms, TokenLogProbs

GOLD = 2.0
"""The label `side` of the third answer that `tpo` imitates."""


@objective()
def cpo(
    log_probs: TokenLogProbs,
    batch: Batch,
    *,
    loss: Literal["sigmoid", "hinge"] = "sigmoid",
    beta: PositiveFloat = 0.1,
    label_smoothing: Doubt = 0.0,
) -> Terms:
    """Contrastive preference optimisation: DPO against a uniform reference.

        value_p = h(L(y_c) - L(y_r))        h as in `pair_loss`

    Args:
        log_probs: any.
        batch: with the label `side`.
        loss: which h; `hinge` is SLiC's.
        beta: what multiplies the margin.
        label_smoothing: the probability that a pair is swapped; of `sigmoid` alone.

    Returns:
        Terms [P].

    Source: Xu et al. 2024, arXiv:2401.08417, equation 3 without its NLL.
    """
    pairs = Pairs(Sequences(batch))
    margin_P = torch.sub(*pairs.sides(pairs.sequences.sum(log_probs.logprob_T)))
    return Terms(pair_loss(margin_P, loss, beta=beta, label_smoothing=label_smoothing), pairs.weight_P)


@objective()
def simpo(
    log_probs: TokenLogProbs,
    batch: Batch,
    *,
    beta: PositiveFloat = 2.0,
    gamma: NonNegativeFloat = 1.0,
    label_smoothing: Doubt = 0.0,
) -> Terms:
    """Simple preference optimisation: the chosen answer is likelier per token, by a margin.

        value_p = -log sigmoid(beta m(y_c) - beta m(y_r) - gamma)

    Args:
        log_probs: any.
        batch: with the label `side`.
        beta: what multiplies mean log-probabilities.
        gamma: the margin, after beta (TRL's simpo_gamma; the paper tunes gamma / beta).
        label_smoothing: the probability that a pair is swapped (TRL's; the paper has none).

    Returns:
        Terms [P].

    Source: Meng et al. 2024, arXiv:2405.14734, equation 6.
    """
    pairs = Pairs(Sequences(batch))
    margin_P = beta * torch.sub(*pairs.sides(pairs.sequences.mean(log_probs.logprob_T)))
    return _with_margin(margin_P - gamma, pairs, label_smoothing)


@objective()
def alphapo(
    log_probs: TokenLogProbs,
    batch: Batch,
    *,
    alpha: float = 0.25,
    beta: PositiveFloat = 2.0,
    gamma: NonNegativeFloat = 1.0,
    label_smoothing: Doubt = 0.0,
) -> Terms:
    """SimPO with a reward of another shape, which alpha bends.

        value_p = -log sigmoid(r_c - r_r - gamma)        r = beta (1 - exp(m(y))^-alpha) / alpha

    Args:
        log_probs: any.
        batch: with the label `side`.
        alpha: above 0 unlikely answers matter more, below 0 less; 0 is `simpo`, the limit.
        beta: as in `simpo`.
        gamma: as in `simpo`.
        label_smoothing: as in `simpo`.

    Returns:
        Terms [P].

    Source: Gupta et al. 2025, arXiv:2501.03884.
    """
    pairs = Pairs(Sequences(batch))
    mean_S = pairs.sequences.mean(log_probs.logprob_T)
    reward_S = mean_S if alpha == 0 else -torch.expm1(-alpha * mean_S) / alpha
    return _with_margin(beta * torch.sub(*pairs.sides(reward_S)) - gamma, pairs, label_smoothing)


@objective()
def orpo(log_probs: TokenLogProbs, batch: Batch) -> Terms:
    """The odds-ratio term of ORPO, whose weight is the paper's lambda; `chosen_nll` is listed beside.

        value_p = -log sigmoid(o(y_c) - o(y_r))        o(y) = log [p / (1 - p)],  p = exp(m(y))

    1 - p is computed by log1mexp. An answer with p = 1 up to rounding counts as the largest p below 1.

    Returns:
        Terms [P]; ln 2 for sides that are equally likely.

    Source: Hong et al. 2024, arXiv:2403.07691, equations 4 and 7.
    """
    pairs = Pairs(Sequences(batch))
    mean_S = pairs.sequences.mean(log_probs.logprob_T)
    mean_S = mean_S.clamp(max=-torch.finfo(mean_S.dtype).eps)
    margin_P = torch.sub(*pairs.sides(mean_S - log1mexp(mean_S)))
    return _with_margin(margin_P, pairs, 0.0)


@objective()
def tpo(
    log_probs: TokenLogProbs,
    batch: Batch,
    *,
    beta: PositiveFloat = 0.01,
    gamma: NonNegativeFloat = 0.0,
    alpha: NonNegativeFloat = 1.0,
    length_normalised: bool = False,
    gold: Literal["mean", "sum"] = "mean",
) -> Terms:
    """Triple preference optimisation: imitate a gold answer, and prefer one of two others.

        value_p = -log sigmoid(beta L(y_c) - beta L(y_r) - gamma) - alpha m(y_gold)
        length_normalised (TPO-L): m instead of L in the margin

    The unit has three sequences, with the label `side` 1, 0, and 2 for the gold answer. Ambiguous where
    published: the formula has L(y_gold), usual code a mean by token. Here it is the mean of each gold answer
    (`gold` is the switch; TRL's mean is over all gold tokens of its batch).

    Args:
        log_probs: any.
        batch: with the label `side`.
        beta: what multiplies the margin.
        gamma: the margin of TPO-L.
        alpha: the weight of imitation.
        length_normalised: whether the margin is one of means by token.
        gold: the gold answer's log-probability: mean or sum by token.

    Returns:
        Terms [P], one per triple.

    Raises:
        BadInput: a pair without its gold answer.

    Source: Saeidi et al. 2024, arXiv:2405.16681.
    """
    side_T = batch.column("side", batch.weight_T > 0)
    golden, others = (
        Sequences(replace(batch, weight_T=batch.weight_T.masked_fill(left_T, 0.0)))
        for left_T in (side_T != GOLD, side_T == GOLD)
    )
    pairs = Pairs(others)
    order = golden.unit_S.argsort(stable=True)
    if not torch.equal(golden.unit_S[order], pairs.sides(others.unit_S)[0]):
        raise BadInput(
            f"{len(golden)} gold answers are not one for each of {len(others) // 2} pairs",
            fix="give each preference record a gold answer too: gold",
        )
    score = others.mean if length_normalised else others.sum
    margin_P = beta * torch.sub(*pairs.sides(score(log_probs.logprob_T))) - gamma
    imitate = golden.mean if gold == "mean" else golden.sum
    gold_P = imitate(log_probs.logprob_T).index_select(0, order)
    return Terms(-F.logsigmoid(margin_P) - alpha * gold_P, pairs.weight_P)


def _with_margin(z_P: Tensor, pairs: Pairs, label_smoothing: float) -> Terms:
    return Terms(pair_loss(z_P, "sigmoid", beta=1.0, label_smoothing=label_smoothing), pairs.weight_P)
