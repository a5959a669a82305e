"""Objectives of maximum likelihood and its neighbours: pure functions from log-probabilities to terms.

Each returns one term per token, unreduced, with the batch's own weights; none takes a mean. `nll` is only
ever the negative log-likelihood: z-loss, smoothing and penalties are objectives of their own, so a reported
`nll` means the same in every run.

How examples weigh. A document's weight multiplies its tokens' weights. `nll` with the reduction

    by token      sum_d w_d sum_t nll_dt / sum_d w_d n_d     every token of an example weighs what it weighs
    by sequence   1/D sum_d 1/n_d sum_t nll_dt               documents weigh the same, whatever their weight

and `sequence_nll` gives the two means over examples that these are not: of whole sequences' log-likelihoods,
and of their mean token's, both with the weights of the examples.

Left out: preferences between answers.

Shape legend: T tokens, S sequences, C candidate tokens per position, W tokens looked back at.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt
from torch import Tensor

from gyrocompass.core.errors import BadInput
from gyrocompass.loss.registry import objective
from gyrocompass.loss.sequences import Sequences
from gyrocompass.loss.signal import IGNORE_INDEX, Batch, Terms, TokenLogProbs

Share = Annotated[float, Field(ge=0.0, le=1.0)]
TokenIds = tuple[NonNegativeInt, ...]


@objective(separable=True)
def nll(log_probs: TokenLogProbs, batch: Batch) -> Terms:
    """Negative log-likelihood of the target.

        value_t = -log p(y_t)

    Returns:
        Terms [T] in nats; its mean by token is the cross entropy.
    """
    return Terms(-log_probs.logprob_T, batch.weight_T)


@objective(separable=True)
def excess_nll(log_probs: TokenLogProbs, batch: Batch) -> Terms:
    """Negative log-likelihood above that of a reference on the same tokens.

        value_t = log p_ref(y_t) - log p(y_t)

    Its gradient is that of `nll`; its mean says how far a model has moved from the reference, and can be kept
    under a bound (`blend: {lagrangian: ...}`).

    Args:
        log_probs: any.
        batch: with the column `reference_logprob`.

    Returns:
        Terms [T] in nats, of either sign.
    """
    reference_T = batch.column("reference_logprob", batch.weight_T > 0)
    return Terms(reference_T.to(log_probs.logprob_T.dtype) - log_probs.logprob_T, batch.weight_T)


@objective()
def sequence_nll(log_probs: TokenLogProbs, batch: Batch, *, length_normalised: bool = False) -> Terms:
    """Negative log-likelihood of whole sequences, each an example with a weight.

        value_s = -sum_t w_t/w_s log p(y_t)        w_s = max_t w_t
        length-normalised: value_s = -sum_t w_t log p(y_t) / sum_t w_t

    The mean by token is then sum_s w_s value_s / sum_s w_s: over examples, not over tokens. Where all tokens
    of an example have its weight, value_s is -log p(y | x), or its mean over the tokens.

    Args:
        log_probs: any.
        batch: a sequence is a segment, so a long document that was cut is several; name units to keep
            documents whole.
        length_normalised: take the mean over a sequence's tokens instead of their sum.

    Returns:
        Terms [S] in nats; the weight of a sequence is the largest of its tokens' weights.
    """
    sequences = Sequences(batch)
    nll_S = sequences.sum(-log_probs.logprob_T * batch.weight_T)
    share_S = sequences.sum(batch.weight_T) if length_normalised else sequences.weight_S
    return Terms(nll_S / share_S, sequences.weight_S)


@objective(separable=True)
def dft(log_probs: TokenLogProbs, batch: Batch) -> Terms:
    """Dynamic fine-tuning: negative log-likelihood weighed by how likely the target already is.

        value_t = -sg(p_t) log p_t        p_t = p(y_t), sg: taken as a constant

    The gradient is that of -p_t: what `nll` multiplies by 1 / p_t, the rare targets, is taken back.
    Used instead of `nll`.

    Returns:
        Terms [T] in nats. p_t is a factor of the value, never of the weight: the mean is over tokens.

    Source: Wu et al. 2025, arXiv:2508.05629.
    """
    logprob_T = log_probs.logprob_T
    return Terms(-logprob_T.detach().exp() * logprob_T, batch.weight_T)


@objective(wants=("mean_logit",), separable=True)
def label_smoothing(log_probs: TokenLogProbs, batch: Batch, *, epsilon: Share = 0.1) -> Terms:
    """Cross entropy against the target mixed with the uniform distribution; used instead of `nll`.

        value_t = (1 - epsilon) * (lse_t - z[t, y_t]) + epsilon * (lse_t - mean_v z[t, v])

    Args:
        log_probs: with mean_logit_T.
        batch: weights are its own.
        epsilon: the share of the uniform distribution; 0 is `nll`.

    Returns:
        Terms [T] in nats, equal to `F.cross_entropy(label_smoothing=epsilon)` on full logits.

    Source: Szegedy et al. 2016, arXiv:1512.00567.
    """
    assert log_probs.mean_logit_T is not None
    to_uniform_T = log_probs.lse_T - log_probs.mean_logit_T
    return Terms(-(1 - epsilon) * log_probs.logprob_T + epsilon * to_uniform_T, batch.weight_T)


@objective(separable=True)
def z_loss(log_probs: TokenLogProbs, batch: Batch, *, coefficient: NonNegativeFloat = 1e-4) -> Terms:
    """Keeps the log-normaliser near 0; an addition to `nll`, never a part of it.

        value_t = coefficient * lse_t^2

    Source: PaLM, arXiv:2204.02311, section 5.
    """
    return Terms(coefficient * log_probs.lse_T.square(), batch.weight_T)


@objective(wants=("entropy",), separable=True)
def confidence_penalty(log_probs: TokenLogProbs, batch: Batch, *, coefficient: NonNegativeFloat) -> Terms:
    """Rewards an undecided distribution (the entropy bonus of reinforcement learning).

        value_t = -coefficient * H_t        H_t = -sum_v p_v log p_v

    Source: Pereyra et al. 2017, arXiv:1701.06548.
    """
    assert log_probs.entropy_T is not None
    return Terms(-coefficient * log_probs.entropy_T, batch.weight_T)


@objective(separable=True)
def focal(log_probs: TokenLogProbs, batch: Batch, *, gamma: NonNegativeFloat = 2.0) -> Terms:
    """Negative log-likelihood that cares less for targets already likely; used instead of `nll`.

        value_t = (1 - p_t)^gamma * -log p_t

    1 - p is computed as -expm1(log p), which is exact near p = 1.

    Args:
        log_probs: any.
        batch: weights are its own.
        gamma: how fast the care fades; 0 is `nll`.

    Source: Lin et al. 2017, arXiv:1708.02002.
    """
    logprob_T = _below_certain(log_probs.logprob_T)
    return Terms((-torch.expm1(logprob_T)) ** gamma * -logprob_T, batch.weight_T)


def unlikelihood_candidates(batch: Batch, *, window: int, tokens: TokenIds) -> Tensor:
    """The tokens a position should not say: those just read in its segment, and those listed.

        C_t = ({x_{t-window+1}, ..., x_t} in the segment of t, with `tokens`) without y_t

    Returns:
        int64 [T, window + len(tokens)]; each token once, `IGNORE_INDEX` where there is none.
    """
    if window == 0 and not tokens:
        raise BadInput("unlikelihood has no candidates", fix="set window above 0, or list tokens")
    token_T, segment_T = batch.token_T, batch.segment_T
    columns = [token_T.new_tensor(tokens, dtype=torch.int64).expand(len(token_T), -1)]
    for back in range(min(window, len(token_T))):
        seen_T = torch.full_like(token_T, IGNORE_INDEX)
        same_segment = segment_T[: len(token_T) - back] == segment_T[back:]
        seen_T[back:] = token_T[: len(token_T) - back].masked_fill(~same_segment, IGNORE_INDEX)
        columns.append(seen_T[:, None])
    candidate_TC, _ = torch.cat(columns, dim=1).sort(dim=1)
    again_TC = torch.zeros_like(candidate_TC, dtype=torch.bool)
    again_TC[:, 1:] = candidate_TC[:, 1:] == candidate_TC[:, :-1]
    is_target_TC = candidate_TC == batch.target_T[:, None]
    uncounted_TC = (batch.weight_T <= 0)[:, None]
    return candidate_TC.masked_fill(again_TC | is_target_TC | uncounted_TC, IGNORE_INDEX)


@objective(candidates=unlikelihood_candidates, separable=True)
def unlikelihood(
    log_probs: TokenLogProbs, batch: Batch, *, window: NonNegativeInt = 32, tokens: TokenIds = ()
) -> Terms:
    """Makes repeated or listed tokens unlikely; an addition to `nll`.

        value_t = -sum_{c in C_t} log(1 - p(c))

    log(1 - p) is computed from log p by log1mexp, exact at both ends. A candidate with p = 1 up to rounding
    counts as the largest probability below 1, so the value stays finite.

    Args:
        log_probs: with the candidates of `unlikelihood_candidates`.
        batch: weights are its own.
        window: how many of the last tokens read in the same segment are candidates; 0 for none.
        tokens: token ids that are candidates everywhere.

    Returns:
        Terms [T] in nats; 0 where a position has no candidate.

    Source: Welleck et al. 2019, arXiv:1908.04319.
    """
    assert log_probs.candidate_TC is not None
    candidate_TC = unlikelihood_candidates(batch, window=window, tokens=tokens)
    penalty_TC = -log1mexp(_below_certain(log_probs.candidate_TC))
    return Terms(penalty_TC.masked_fill(candidate_TC == IGNORE_INDEX, 0.0).sum(dim=1), batch.weight_T)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, accurate from x near 0 to x = -inf, and so is its gradient.

    Each half of the axis has its own formula; the unused one is fed a harmless number, since a NaN there
    would reach the gradient.

    Source: Maechler 2012, "Accurately computing log(1 - exp(-|a|))".

    >>> log1mexp(torch.tensor([-1e-5, -50.0, -torch.inf])).tolist()
    [-11.512930870056152, -1.9287498933537385e-22, -0.0]
    """
    near_zero = x > -math.log(2)
    small = torch.log(-torch.expm1(torch.where(near_zero, x, -math.log(2))))
    large = torch.log1p(-torch.exp(torch.where(near_zero, -math.log(2), x)))
    return torch.where(near_zero, small, large)


def _below_certain(logprob: Tensor) -> Tensor:
    """Log-probabilities kept below 0 by a rounding step: at p = 1 a power or log of 1 - p has no gradient."""
    return logprob.clamp(max=-torch.finfo(logprob.dtype).eps)
