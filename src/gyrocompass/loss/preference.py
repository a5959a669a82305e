"""Objectives of pairs with a reference: pure functions from the log-ratios of two answers to terms.

A pair is a unit of two sequences, one chosen and one rejected (`Pairs`). With x the prompt, y an answer,

    l(y) = sum_t log pi(y_t | x, y_<t) - log pi_ref(y_t | x, y_<t)        over the counted tokens of y

where the reference's part comes from the column `reference_logprob`. Numerator, reference and length share
one mask: the batch's. `dpo` holds every loss that is a function of one margin l(y_c) - l(y_r); losses that
look at each side by itself have names of their own. Each returns one term per pair, in the order of `Pairs`,
weighted by the chosen side; none takes a mean. `aot` alone sorts across the window.

A term of supervised learning is no part of any of them: list `chosen_nll` beside, with a weight.

Left out: pairs sampled while training, and preferences that are probabilities of a judge.

Shape legend: T positions, S sequences, P pairs.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat
from torch import Tensor

from gyrocompass.core.errors import BadInput
from gyrocompass.loss.likelihood import Share
from gyrocompass.loss.margin import Doubt, FDivergence, PairLoss, f_scores, pair_loss
from gyrocompass.loss.registry import objective
from gyrocompass.loss.sequences import Pairs, Sequences
from gyrocompass.loss.signal import Batch, Terms, TokenLogProbs

Between = Annotated[float, Field(gt=0.0, lt=1.0)]


@objective()
def dpo(
    log_probs: TokenLogProbs,
    batch: Batch,
    *,
    loss: PairLoss = "sigmoid",
    beta: PositiveFloat = 0.1,
    label_smoothing: Doubt = 0.0,
    length_normalised: bool = False,
    ld_alpha: Share = 1.0,
    f_divergence: FDivergence = "reverse_kl",
    f_alpha: Between = 0.5,
    discopop_tau: PositiveFloat = 0.05,
) -> Terms:
    """Direct preference optimisation: a loss of how much more the policy moved to the chosen answer.

        value_p = h(s(y_c) - s(y_r))        h as in `pair_loss`

        s = l                               length_normalised: l / |y|
        s = f'(pi / pi_ref)                 with another divergence than the reverse KL:
            forward_kl  1 - exp(-l)         js     log sigmoid(l) + log 2
            alpha       (1 - exp(-f_alpha l)) / f_alpha
        ld_alpha < 1: in l, a token after the first min(|y_c|, |y_r|) ones of its answer counts ld_alpha times

    Ambiguous where published: IPO's equation 17 is about sums, its authors' figures are of means by token (as
    TRL has it): the sum is the default here, `length_normalised` the mean.

    Args:
        log_probs: any.
        batch: with the column `reference_logprob` and the label `side`.
        loss: which h.
        beta: the strength of the tie to the reference; tau in IPO.
        label_smoothing: the probability that a pair is swapped. `sigmoid` is conservative with it, `robust`
            unbiased, `exo` needs it; the others take none.
        length_normalised: log-ratios per token. Defined for the reverse KL.
        ld_alpha: LD-DPO, 1 is DPO, 0 forgets what only the longer answer has.
        f_divergence: f-DPO's divergence; f_alpha = 0 would be the reverse KL, 1 the forward KL.
        f_alpha: the paper's alpha; TRL's coefficient is 1 - f_alpha. Only `alpha` reads it.
        discopop_tau: only `discopop` reads it.

    Returns:
        Terms [P]; ln 2 where the policy is the reference, with `sigmoid`.

    Raises:
        BadInput: parameters that do not go together, a column or label missing, a sequence without its pair.

    Source: Rafailov et al. 2023, arXiv:2305.18290; LD-DPO, arXiv:2409.06411; f-DPO, arXiv:2309.16240.
    """
    if length_normalised and f_divergence != "reverse_kl":
        raise BadInput(
            f"length_normalised is not defined for {f_divergence}", fix="leave one of the two at its default"
        )
    pairs = Pairs(Sequences(batch))
    ratio_T = log_ratios(log_probs, batch)
    if ld_alpha < 1.0:
        ratio_T = torch.where(beyond_shared_length(pairs), ld_alpha * ratio_T, ratio_T)
    score_S = f_scores(pairs.sequences.sum(ratio_T), f_divergence, f_alpha)
    if length_normalised:
        score_S = score_S / pairs.sequences.length_S.to(score_S.dtype)
    chosen_P, rejected_P = pairs.sides(score_S)
    value_P = pair_loss(
        chosen_P - rejected_P, loss, beta=beta, label_smoothing=label_smoothing, discopop_tau=discopop_tau
    )
    return Terms(value_P, pairs.weight_P)


@objective(wants=("sum_sq",))
def wpo(
    log_probs: TokenLogProbs,
    batch: Batch,
    *,
    loss: PairLoss = "sigmoid",
    beta: PositiveFloat = 0.1,
    label_smoothing: Doubt = 0.0,
) -> Terms:
    """DPO in which a pair counts by how likely the policy itself would be to write it.

        value_p = w(y_c) w(y_r) * h(l(y_c) - l(y_r))        w without gradient
        w(y) = exp(1/|y| sum_t [log p(y_t) - log sum_v p_t(v)^2])

    w compares each token's likelihood with that of a token drawn from the policy, so the policy's own samples
    weigh about 1. It depends on the model, so it is a part of the value: the mean is over pairs, not over w.

    Args:
        log_probs: with sum_sq_T.
        batch: as for `dpo`.
        loss: which h, as in `dpo`.
        beta: as in `dpo`.
        label_smoothing: as in `dpo`.

    Returns:
        Terms [P].

    Source: Zhou et al. 2024, arXiv:2406.11827, equation 2 with sampled alignment.
    """
    assert log_probs.sum_sq_T is not None
    terms = dpo(log_probs, batch, loss=loss, beta=beta, label_smoothing=label_smoothing)
    pairs = Pairs(Sequences(batch))
    with torch.no_grad():
        likely_S = pairs.sequences.mean(log_probs.logprob_T - log_probs.sum_sq_T.log()).exp()
        chosen_P, rejected_P = pairs.sides(likely_S)
    return Terms(terms.value * chosen_P * rejected_P, terms.weight)


@objective()
def nca(log_probs: TokenLogProbs, batch: Batch, *, beta: PositiveFloat = 0.1) -> Terms:
    """Noise-contrastive alignment: the chosen answer's likelihood itself is kept from falling.

        value_p = -log sigmoid(r_c) - 1/2 log sigmoid(-r_c) - 1/2 log sigmoid(-r_r)        r = beta l

    Returns:
        Terms [P]; 2 ln 2 where the policy is the reference.

    Source: Chen et al. 2024, arXiv:2402.05369, for two answers.
    """
    chosen_P, rejected_P, weight_P = _rewards(log_probs, batch, beta)
    noise_P = F.logsigmoid(-chosen_P) + F.logsigmoid(-rejected_P)
    return Terms(-F.logsigmoid(chosen_P) - 0.5 * noise_P, weight_P)


@objective()
def bco(log_probs: TokenLogProbs, batch: Batch, *, beta: PositiveFloat = 0.1) -> Terms:
    """Binary classifier optimisation of pairs: chosen answers are 1, rejected ones 0.

        value_p = -log sigmoid(r_c) - log sigmoid(-r_r)        r = beta l

    Without the paper's shift of r, as TRL has it for pairs; `bco_unpaired` has the shift.

    Returns:
        Terms [P]; 2 ln 2 where the policy is the reference.

    Source: Jung et al. 2024, arXiv:2404.04656.
    """
    chosen_P, rejected_P, weight_P = _rewards(log_probs, batch, beta)
    return Terms(-F.logsigmoid(chosen_P) - F.logsigmoid(-rejected_P), weight_P)


@objective()
def sppo(log_probs: TokenLogProbs, batch: Batch, *, beta: PositiveFloat = 0.1) -> Terms:
    """Self-play preference optimisation with hard preferences: each log-ratio has a target of its own.

        value_p = (l(y_c) - 1 / (2 beta))^2 + (l(y_r) + 1 / (2 beta))^2

    The paper's probability of winning is 1 for the chosen and 0 for the rejected answer; its eta is 1 / beta.

    Returns:
        Terms [P].

    Source: Wu et al. 2024, arXiv:2405.00675, equation 4.7.
    """
    chosen_P, rejected_P, weight_P = _rewards(log_probs, batch, 1.0)
    return Terms((chosen_P - 0.5 / beta).square() + (rejected_P + 0.5 / beta).square(), weight_P)


@objective()
def apo_zero(log_probs: TokenLogProbs, batch: Batch, *, beta: PositiveFloat = 0.1) -> Terms:
    """Anchored preference optimisation where the chosen answers are better than the model's: up, and down.

        value_p = (1 - sigmoid(r_c)) + sigmoid(r_r)        r = beta l

    Returns:
        Terms [P]; 1 where the policy is the reference.

    Source: D'Oosterlinck et al. 2024, arXiv:2408.06266, equation 7.
    """
    chosen_P, rejected_P, weight_P = _rewards(log_probs, batch, beta)
    return Terms(torch.sigmoid(-chosen_P) + torch.sigmoid(rejected_P), weight_P)


@objective()
def apo_down(log_probs: TokenLogProbs, batch: Batch, *, beta: PositiveFloat = 0.1) -> Terms:
    """Anchored preference optimisation where the model is better than both: down, and further down.

        value_p = sigmoid(r_c) + (1 - sigmoid(r_c - r_r))        r = beta l

    Returns:
        Terms [P]; 1 where the policy is the reference.

    Source: D'Oosterlinck et al. 2024, arXiv:2408.06266, equation 8.
    """
    chosen_P, rejected_P, weight_P = _rewards(log_probs, batch, beta)
    return Terms(torch.sigmoid(chosen_P) + torch.sigmoid(rejected_P - chosen_P), weight_P)


@objective(whole_window=True)
def aot(
    log_probs: TokenLogProbs,
    batch: Batch,
    *,
    paired: bool = True,
    beta: PositiveFloat = 0.1,
    label_smoothing: Doubt = 0.0,
) -> Terms:
    """Alignment by optimal transport: the whole distribution of margins moves, quantile by quantile.

        value_i = h(u_(i) - v_(i))        u_(1) <= u_(2) <= ...; h the sigmoid loss of `pair_loss`

        paired      u = log pi(y_c) - log pi(y_r)        v = log pi_ref(y_c) - log pi_ref(y_r)
        unpaired    u = l(y_c)                           v = l(y_r)

    Quantiles are those of the window, not of a micro-batch: it is evaluated on the whole window at once. So
    it does not depend on the split, but it does on how many pairs a window holds.

    Args:
        log_probs: any.
        batch: as for `dpo`; all pairs of the window.
        paired: whether margins or sides are sorted; both read pairs.
        beta: as in `dpo`.
        label_smoothing: as in `dpo` with the sigmoid loss.

    Returns:
        Terms [P]: entry i is the i-th quantile, of no pair in particular.

    Raises:
        BadInput: pairs of different weight, of which quantiles would be of neither.

    Source: Melnyk et al. 2024, arXiv:2406.05882.
    """
    pairs = Pairs(Sequences(batch))
    weight_P = pairs.weight_P
    if (weight_P != weight_P[:1]).any():
        raise BadInput("aot compares quantiles of pairs, which must weigh the same", fix="set no weights")
    reference_T = batch.column("reference_logprob", pairs.sequences.counted_T)
    if paired:
        upper_P, lower_P = (
            torch.sub(*pairs.sides(pairs.sequences.sum(logprob_T)))
            for logprob_T in (log_probs.logprob_T, reference_T.to(log_probs.logprob_T.dtype))
        )
    else:
        upper_P, lower_P = pairs.sides(pairs.sequences.sum(log_ratios(log_probs, batch)))
    margin_P = upper_P.sort().values - lower_P.sort().values
    return Terms(pair_loss(margin_P, "sigmoid", beta=beta, label_smoothing=label_smoothing), weight_P)


@objective()
def chosen_nll(
    log_probs: TokenLogProbs, batch: Batch, *, by: Literal["token", "sequence"] = "token"
) -> Terms:
    """Negative log-likelihood of the chosen answers: the term of supervised learning beside a preference.

        token       value_t = -log p(y_t), weighted as `nll` on chosen sequences, by 0 elsewhere
        sequence    value_s = -1/|y| sum_t log p(y_t)

    By token, a long answer weighs more; by sequence, each answer the same (as in RPO).

    Args:
        log_probs: any.
        batch: with the label `side`.
        by: what weighs the same.

    Returns:
        Terms [T] or [S], in nats per token.

    Source: Pang et al. 2024, arXiv:2404.19733 (by sequence); the SFT loss of TRL's DPO (by token).
    """
    sequences = Sequences(batch)
    if by == "token":
        side_T = batch.column("side", sequences.counted_T)
        return Terms(-log_probs.logprob_T, batch.weight_T.masked_fill(side_T != 1.0, 0.0))
    weight_S = sequences.weight_S.masked_fill(sequences.label("side") != 1.0, 0.0)
    return Terms(-sequences.mean(log_probs.logprob_T), weight_S)


# --- what they share ---


def log_ratios(log_probs: TokenLogProbs, batch: Batch) -> Tensor:
    """log pi(y_t) - log pi_ref(y_t) of each counted token, 0 elsewhere, [T] in nats."""
    counted_T = batch.weight_T > 0
    reference_T = batch.column("reference_logprob", counted_T)
    return (log_probs.logprob_T - reference_T).masked_fill(~counted_T, 0.0)


def beyond_shared_length(pairs: Pairs) -> Tensor:
    """The counted tokens of each answer after the first min(|y_c|, |y_r|), bool [T]."""
    sequences = pairs.sequences
    length_S = sequences.length_S
    shared_P = torch.minimum(*pairs.sides(length_S))
    shared_S = length_S.clone()
    for place_P in pairs.sides(torch.arange(len(length_S), device=length_S.device)):
        shared_S = shared_S.index_copy(0, place_P, shared_P)
    count_T = sequences.counted_T.cumsum(0)  # a segment is one run of positions
    before_S = sequences.at_last(count_T) - length_S.long()
    nth_T = count_T - sequences.spread(before_S)
    return sequences.counted_T & (nth_T > sequences.spread(shared_S))


def _rewards(log_probs: TokenLogProbs, batch: Batch, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """beta l of the chosen and of the rejected sides, and the pairs' weights, [P] each."""
    pairs = Pairs(Sequences(batch))
    chosen_P, rejected_P = pairs.sides(beta * pairs.sequences.sum(log_ratios(log_probs, batch)))
    return chosen_P, rejected_P, pairs.weight_P
