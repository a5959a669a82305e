"""Between log-probabilities and a backend's sums: what is asked, what the answers are, and their gradient.

With p = softmax(z) over the allowed tokens, H the entropy, S = sum p^2 and n how many are allowed, the
gradient of all outputs together is

    dz_v = p_v * (a + b * log p_v + c * p_v) + d + gradients of the picks at v       for allowed v
    a = g_lse - sum g_picks - g_H * H - 2 g_S * S      b = -g_H      c = 2 g_S      d = g_mean / n

A pick is a token whose log-probability was asked for: the target, a candidate, or one of the top list.
Backends work on x = z - top, where top is the row's largest logit: p = exp(x) / sum exp(x), and huge logits
cost no precision.

Shape legend: N counted tokens, V vocabulary, C candidates per token, P picks, J picks of one row, K tokens of
a top list.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gyrocompass.loss._question import Asks, Logits, Picks, Slopes, Sums
from gyrocompass.loss.signal import TokenLogProbs


class Question(NamedTuple):
    """What the caller wants of the logits: checked input, ignored positions already taken out."""

    logits: Logits
    target_N: Tensor
    candidate_NC: Tensor | None
    """-1 where there is no candidate."""
    want: frozenset[str]
    top: int = 0
    seed_N: Tensor | None = None
    first_token: int = 0
    """The id of the first token of `logits.w_VD`: above 0 where this rank holds a later part."""

    def picks(self, top_token_NK: Tensor | None = None) -> Picks:
        """Targets, candidates and top tokens, row after row, as ids of this part of the vocabulary."""
        columns = [self.target_N[:, None]]
        columns += [column for column in (self.candidate_NC, top_token_NK) if column is not None]
        token_NJ = torch.cat(columns, dim=1)
        row_NJ = torch.arange(len(token_NJ), device=token_NJ.device)[:, None].expand(token_NJ.shape)
        here_NJ = token_NJ - self.first_token
        is_here_NJ = (token_NJ >= 0) & (here_NJ >= 0) & (here_NJ < len(self.logits.w_VD))
        return Picks(row_NJ.flatten().contiguous(), here_NJ.masked_fill(~is_here_NJ, -1).reshape(-1))

    def asks(self, threshold_N: Tensor | None) -> Asks:
        """The sums that the wanted statistics are made of."""
        return Asks(
            entropy="entropy" in self.want,
            mean_logit="mean_logit" in self.want,
            sum_sq="sum_sq" in self.want,
            threshold_N=threshold_N,
            top=self.top,
            seed_N=self.seed_N,
            first_token=self.first_token,
        )


class Scale(NamedTuple):
    """What the pass back needs of the pass forward."""

    top_N: Tensor
    exp_N: Tensor
    entropy_N: Tensor | None
    sum_sq_N: Tensor | None
    count_N: Tensor | None
    top_token_NK: Tensor | None


def target_logits(question: Question) -> Tensor:
    """The targets' logits by a product of their own, [N]; 0 for targets of another part of the vocabulary."""
    logits = question.logits
    softcap, logit_scale, temperature = logits.rule
    here_N = question.target_N - question.first_token
    is_here_N = (here_N >= 0) & (here_N < len(logits.w_VD))
    here_N = here_N.masked_fill(~is_here_N, 0)
    z_N = _dots(logits.h_ND, logits.w_VD, here_N, logits.dtype)
    if logits.a_NR is not None and logits.b_VR is not None:
        z_N = z_N + _dots(logits.a_NR, logits.b_VR, here_N, logits.dtype)
    if logits.bias_V is not None:
        z_N = z_N + logits.bias_V[here_N].to(logits.dtype)
    outside_N = z_N.isneginf()
    z_N = z_N * logit_scale
    if softcap is not None:
        z_N = softcap * torch.tanh(z_N / softcap)
    return (z_N / temperature).masked_fill(outside_N, -torch.inf).masked_fill(~is_here_N, 0.0)


def _dots(left_ND: Tensor, right_VD: Tensor, row_N: Tensor, dtype: torch.dtype) -> Tensor:
    """The product of each row with one row of the other, some thousand at a time."""
    parts = [
        (left_ND[start : start + _DOTS].to(dtype) * right_VD[row_N[start : start + _DOTS]].to(dtype)).sum(1)
        for start in range(0, len(row_N), _DOTS)
    ]
    return torch.cat([left_ND.new_empty(0, dtype=dtype), *parts])


_DOTS = 1024


def finish(question: Question, sums: Sums, threshold_N: Tensor | None) -> tuple[TokenLogProbs, Scale]:
    """What the sums say."""
    n_rows, floor_N = len(sums.top_N), question.logits.floor_N
    log_exp_N = sums.exp_N.log()
    pick_NJ = (
        sums.pick_P.view(n_rows, -1) if n_rows else sums.pick_P.view(0, 1 + _width(question.candidate_NC))
    )
    log_p_NJ = (pick_NJ - sums.top_N[:, None]) - log_exp_N[:, None]
    if floor_N is not None:
        log_p_NJ = log_p_NJ.masked_fill(pick_NJ < floor_N[:, None], -torch.inf)
    rank_N = candidate_NC = None
    if threshold_N is not None and sums.above_N is not None:
        # The target's own logit in its tile may differ from the one computed apart by a rounding.
        own_N = pick_NJ[:, 0]
        counts_itself_N = own_N > threshold_N
        if floor_N is not None:
            counts_itself_N &= own_N >= floor_N
        rank_N = sums.above_N - counts_itself_N.long()
    if question.candidate_NC is not None:
        candidate_NC = log_p_NJ[:, 1:].masked_fill(question.candidate_NC < 0, 0.0)
    entropy_N = None if sums.exp_x_N is None else log_exp_N - sums.exp_x_N / sums.exp_N
    sum_sq_N = None if sums.exp_sq_N is None else sums.exp_sq_N / sums.exp_N.square()
    top_NK = None if sums.top_NK is None else (sums.top_NK - sums.top_N[:, None]) - log_exp_N[:, None]
    answer = TokenLogProbs(
        logprob_T=log_p_NJ[:, 0].clone(),
        lse_T=sums.top_N + log_exp_N,
        entropy_T=entropy_N,
        mean_logit_T=None if sums.z_N is None or sums.count_N is None else sums.z_N / sums.count_N,
        sum_sq_T=sum_sq_N,
        rank_T=rank_N,
        candidate_TC=candidate_NC,
        top_TK=top_NK,
        top_token_TK=sums.top_token_NK,
        drawn_T=sums.drawn_N,
    )
    return answer, Scale(sums.top_N, sums.exp_N, entropy_N, sum_sq_N, sums.count_N, sums.top_token_NK)


def _width(candidate_NC: Tensor | None) -> int:
    return 0 if candidate_NC is None else candidate_NC.shape[1]


def slopes(question: Question, scale: Scale, gradient: TokenLogProbs) -> Slopes:
    """Gather the gradients of all outputs into one formula; picks are those of `question.picks`, in order.

    The top tokens are among the picks if `gradient` has their gradient.
    """
    rule, exp_N = question.logits.rule, scale.exp_N
    factor = rule.logit_scale / rule.temperature
    pick_NJ = _pick_gradients(question, gradient, exp_N)
    a_N, b_N, c_N, d_N = -pick_NJ.sum(dim=1), None, None, None
    if gradient.lse_T is not None:
        a_N = a_N + gradient.lse_T
    if gradient.entropy_T is not None and scale.entropy_N is not None:
        # log p = x - log exp: the constant part goes into a.
        a_N = a_N - gradient.entropy_T * (scale.entropy_N - exp_N.log())
        b_N = -gradient.entropy_T * factor / exp_N
    if gradient.sum_sq_T is not None and scale.sum_sq_N is not None:
        a_N = a_N - 2 * gradient.sum_sq_T * scale.sum_sq_N
        c_N = 2 * gradient.sum_sq_T * factor / exp_N.square()
    if gradient.mean_logit_T is not None and scale.count_N is not None:
        d_N = gradient.mean_logit_T * factor / scale.count_N
    return Slopes(scale.top_N, a_N * factor / exp_N, b_N, c_N, d_N, (pick_NJ * factor).view(-1))


def _pick_gradients(question: Question, gradient: TokenLogProbs, like_N: Tensor) -> Tensor:
    """The gradients of the picked log-probabilities, [N, J]."""
    zero_N1 = torch.zeros_like(like_N)[:, None]
    columns = [zero_N1 if gradient.logprob_T is None else gradient.logprob_T[:, None]]
    if question.candidate_NC is not None:
        asked_NC = question.candidate_NC >= 0
        given_NC = zero_N1.expand(asked_NC.shape) if gradient.candidate_TC is None else gradient.candidate_TC
        columns.append(given_NC.masked_fill(~asked_NC, 0.0))
    if gradient.top_TK is not None:
        columns.append(gradient.top_TK)
    return torch.cat(columns, dim=1)
