"""The plain backend: full logits, obvious code, autograd. It defines what every other backend must return.

It holds several [N, V] tensors, so it is for reading, for tests and for derivatives of any order.

Shape legend: N counted tokens, D hidden width, V vocabulary, C candidates per token, K tokens of a top list.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gyrocompass.loss._engine import Question
from gyrocompass.loss._noise import gumbel
from gyrocompass.loss._question import Logits
from gyrocompass.loss.signal import TokenLogProbs


def reference(question: Question, top_k: int = 0, top_p: float = 1.0) -> TokenLogProbs:
    """Answer with the textbook formulas on full logits.

    A bias of -inf takes its token out of the vocabulary: the logit is the constant -inf, whatever the
    softcap, and no gradient passes through it. A top-k and top-p support takes out more, row by row.

    Returns:
        `TokenLogProbs` of N rows.
    """
    target_N, candidate_NC, want = question.target_N, question.candidate_NC, question.want
    z_NV, allowed_NV = _logits(question.logits)
    if top_k or top_p < 1.0:
        allowed_NV = allowed_NV & _support(z_NV.detach(), top_k, top_p)
    z_NV = z_NV.masked_fill(~allowed_NV, -torch.inf)

    # Relative to the largest logit (a constant that cancels), huge logits cost no precision.
    top_N1 = z_NV.detach().amax(dim=1, keepdim=True)
    log_exp_N = (z_NV - top_N1).logsumexp(dim=1)
    log_p_NV = (z_NV - top_N1) - log_exp_N[:, None]
    entropy_N = mean_logit_N = sum_sq_N = rank_N = log_p_candidate_NC = None
    if "entropy" in want:
        entropy_N = -(log_p_NV.exp() * log_p_NV.masked_fill(~allowed_NV, 0.0)).sum(dim=1)
    if "mean_logit" in want:
        mean_logit_N = z_NV.masked_fill(~allowed_NV, 0.0).sum(dim=1) / allowed_NV.sum(dim=1)
    if "sum_sq" in want:
        sum_sq_N = (2 * log_p_NV).exp().sum(dim=1)
    if "rank" in want:
        rank_N = (z_NV > z_NV.gather(1, target_N[:, None])).sum(dim=1)
    if candidate_NC is not None:
        picked_NC = log_p_NV.gather(1, candidate_NC.clamp(min=0))
        log_p_candidate_NC = picked_NC.masked_fill(candidate_NC < 0, 0.0)
    top = log_p_NV.topk(question.top, dim=1) if question.top else None
    return TokenLogProbs(
        logprob_T=log_p_NV.gather(1, target_N[:, None]).squeeze(1),
        lse_T=top_N1.squeeze(1) + log_exp_N,
        entropy_T=entropy_N,
        mean_logit_T=mean_logit_N,
        sum_sq_T=sum_sq_N,
        rank_T=rank_N,
        candidate_TC=log_p_candidate_NC,
        top_TK=None if top is None else top.values,
        top_token_TK=None if top is None else top.indices,
        drawn_T=None if question.seed_N is None else _draw(z_NV.detach(), question.seed_N),
    )


def _logits(logits: Logits) -> tuple[Tensor, Tensor]:
    """All logits (finite ones where nothing is allowed), and which tokens are in the vocabulary: [N, V]."""
    dtype, rule = logits.dtype, logits.rule
    z_NV = logits.h_ND.to(dtype) @ logits.w_VD.to(dtype).T
    if logits.a_NR is not None and logits.b_VR is not None:
        z_NV = z_NV + logits.a_NR.to(dtype) @ logits.b_VR.to(dtype).T
    outside_V = torch.zeros(z_NV.shape[1], dtype=torch.bool, device=z_NV.device)
    if logits.bias_V is not None:
        outside_V = logits.bias_V.isneginf()
        z_NV = z_NV + logits.bias_V.to(dtype).masked_fill(outside_V, 0.0)
    z_NV = z_NV * rule.logit_scale
    if rule.softcap is not None:
        z_NV = rule.softcap * torch.tanh(z_NV / rule.softcap)
    z_NV = (z_NV / rule.temperature).masked_fill(outside_V, -torch.inf)
    return z_NV, ~outside_V.expand(z_NV.shape)


def _support(z_NV: Tensor, top_k: int, top_p: float) -> Tensor:
    """What is left by top-k, then by top-p of the rest, [N, V]; what equals the last one inside is in.

    A NaN is in too, so that its row has no numbers."""
    ordered = z_NV.sort(dim=1, descending=True)
    if top_k and top_k < z_NV.shape[1]:
        ordered_NV = ordered.values.clone()
        ordered_NV[:, top_k:] = -torch.inf
    else:
        ordered_NV = ordered.values
    p_NV = ordered_NV.softmax(dim=1)
    is_in_NV = ordered_NV > -torch.inf
    if top_p < 1.0:
        is_in_NV &= p_NV.cumsum(dim=1) - p_NV < top_p
    is_in_NV[:, :1] = True
    last_N1 = ordered_NV.gather(1, is_in_NV.sum(dim=1, keepdim=True) - 1)
    return ~(z_NV < last_N1)


def _draw(z_NV: Tensor, seed_N: Tensor) -> Tensor:
    """A token of each row by the largest of logit plus noise."""
    token_V = torch.arange(z_NV.shape[1], device=z_NV.device)
    return (z_NV + gumbel(seed_N, token_V, z_NV.dtype)).argmax(dim=1)
