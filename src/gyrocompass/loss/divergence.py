"""Divergences between the next-token distributions of two heads, token by token, without [T, V].

With p the student's distribution, q the teacher's, and M = (1 - beta) p + beta q:

    forward_kl        KL(q || p) = sum_v q log(q / p)
    reverse_kl        KL(p || q) = sum_v p log(p / q)
    jsd               beta KL(q || M) + (1 - beta) KL(p || M)
    total_variation   1/2 sum_v |p - q|

Two heads are compared tile by tile (`_two_heads.py`), the teacher with or without gradients of its own.
A teacher of which only the k likeliest tokens are known is compared on k + 1 outcomes: these tokens, and all
others together. The divergence of outcomes put together is never above that of all tokens.

Heads may be cut over ranks along the vocabulary (`logprob.py` says how), both on the same mesh.

Left out: top-k and top-p supports, derivatives above the first (also of `top_k`'s
log-probabilities, which are constants), sequence-level divergences, and any mean (`reduce.py` has it).

Shape legend: T positions, N counted positions, D hidden width (of each head its own), V vocabulary, R rank of
a low-rank addition, K tokens known of a teacher, O = K + 1 outcomes.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from gyrocompass.core.errors import BadInput, did_you_mean
from gyrocompass.loss._question import LogitRule, Logits
from gyrocompass.loss._sharded import local_part, part_of_head
from gyrocompass.loss._two_heads import KINDS, Measure, between_heads, first_only
from gyrocompass.loss.logprob import token_logprobs
from gyrocompass.loss.signal import Kind


class Head(NamedTuple):
    """A next-token distribution: softmax of softcap * tanh((h w^T + a b^T + bias) * logit_scale / softcap) /
    temperature, with the arguments of `token_logprobs`."""

    h_TD: Tensor
    w_VD: Tensor
    bias_V: Tensor | None = None
    low_rank: tuple[Tensor, Tensor] | None = None
    softcap: float | None = None
    logit_scale: float = 1.0
    temperature: float = 1.0


class TopK(NamedTuple):
    """The likeliest tokens of a teacher, as many at each position; constants."""

    token_TK: Tensor
    """int64, no token twice."""
    logprob_TK: Tensor
    """Their log-probabilities under the whole distribution: what they leave of 1 is all other tokens'."""


def divergence(
    student: Head,
    teacher: Head | TopK,
    kind: Kind = "forward_kl",
    *,
    beta: float = 0.5,
    mask_T: Tensor | None = None,
) -> Tensor:
    """How far the student's next-token distribution is from the teacher's, at each position.

        forward_kl = sum_v q log(q / p)        M = (1 - beta) p + beta q
        reverse_kl = sum_v p log(p / q)        jsd = beta KL(q || M) + (1 - beta) KL(p || M)
        total_variation = 1/2 sum_v |p - q|

    A token that is not in the student's vocabulary (a bias of -inf) but has a probability for the teacher
    makes the forward KL infinite; the other way round, the reverse KL. The other two are always finite.

    Args:
        student: p; gradients go to each of its tensors that requires one.
        teacher: q, a head over the same V tokens (its hidden width is its own), which gets gradients too if
            its tensors require them; or its k likeliest tokens. What these leave of 1 is known up to the eps
            of the answer's dtype, for both: less counts as eps, without a gradient.
        kind: which divergence. JSD is that of GKD: symmetric at beta = 1/2; as beta goes to 0, jsd / beta
            goes to the forward KL, and as it goes to 1, jsd / (1 - beta) to the reverse KL. (At 0 and 1
            itself it would be 0, and is refused; some trainers switch to the KL divergences there.)
        beta: the teacher's share of M; above 0 and below 1. Only `jsd` reads it.
        mask_T: bool [T], True where a position counts; others are not computed, cost nothing, and are 0.

    Returns:
        [T] in nats, float64 if any input is, else float32.

    Raises:
        BadInput: shapes, dtypes or devices that do not fit, a number out of its range, a kind that does not
            exist, tokens outside the vocabulary or twice in a row, log-probabilities that sum to more than 1.

    >>> student = Head(torch.tensor([[1.0, 0.0]]), torch.eye(2))
    >>> [round(float(divergence(student, student._replace(temperature=2.0), kind)), 4) for kind in KINDS]
    [0.028, 0.0263, 0.0068, 0.1086]

    Source: Agarwal et al. 2024, arXiv:2306.13649 (GKD), equation 1.
    """
    _check(student, teacher, kind, beta, mask_T)
    n_tokens, dtype = len(student.h_TD), _dtype(student, teacher)
    kept_N = None if mask_T is None else mask_T.nonzero().squeeze(1)
    with torch.autocast(student.h_TD.device.type, enabled=False):
        measure = Measure(kind, beta)
        if isinstance(teacher, TopK):
            found_N = _from_top_k(
                _rows_of_head(student, kept_N), _rows_of_top(teacher, kept_N), measure, dtype
            )
        else:
            heads, group = _own_parts(student, teacher)
            of_student, of_teacher = (_logits(_rows_of_head(head, kept_N)) for head in heads)
            found_N = between_heads(of_student, of_teacher, measure, dtype, group)
    return found_N if kept_N is None else found_N.new_zeros(n_tokens).index_copy(0, kept_N, found_N)


def _rows(part: Tensor, kept_N: Tensor | None) -> Tensor:
    return part if kept_N is None else part.index_select(0, kept_N)


def _rows_of_head(head: Head, kept_N: Tensor | None) -> Head:
    low_rank = None if head.low_rank is None else (_rows(head.low_rank[0], kept_N), head.low_rank[1])
    return head._replace(h_TD=_rows(head.h_TD, kept_N), low_rank=low_rank)


def _rows_of_top(top: TopK, kept_N: Tensor | None) -> TopK:
    return TopK(_rows(top.token_TK, kept_N), _rows(top.logprob_TK.detach(), kept_N))


def _own_parts(student: Head, teacher: Head) -> tuple[list[Head], str]:
    """What this rank holds of both, and the group over whose ranks they are cut; "" if they are whole."""
    parts, heads = [part_of_head(head.w_VD) for head in (student, teacher)], []
    if parts[0].group != parts[1].group:
        raise BadInput(
            "the student's and the teacher's heads are not cut over the same ranks",
            fix="shard both along the vocabulary on one mesh, or neither",
        )
    for head, part in zip((student, teacher), parts, strict=True):
        low_rank = head.low_rank
        if low_rank is not None:
            b_VR = local_part("low_rank[1]", low_rank[1], head.w_VD)
            assert b_VR is not None
            low_rank = low_rank[0], b_VR
        bias_V = local_part("bias_V", head.bias_V, head.w_VD)
        heads.append(head._replace(w_VD=part.w_VD, bias_V=bias_V, low_rank=low_rank))
    return heads, parts[0].group


def _logits(head: Head) -> Logits:
    a_NR, b_VR = head.low_rank or (None, None)
    rule = LogitRule(head.softcap, head.logit_scale, head.temperature)
    return Logits(head.h_TD, head.w_VD, head.bias_V, a_NR, b_VR, rule)


def _dtype(student: Head, teacher: Head | TopK) -> torch.dtype:
    """Of the arithmetic between both and of the answer."""
    if isinstance(teacher, TopK):
        wide = torch.float64 if teacher.logprob_TK.dtype == torch.float64 else torch.float32
    else:
        wide = _logits(teacher).dtype
    return torch.promote_types(wide, _logits(student).dtype)


# --- checks ---


def _check(student: Head, teacher: Head | TopK, kind: str, beta: float, mask_T: Tensor | None) -> None:
    """Raise BadInput unless everything fits together."""
    if kind not in KINDS:
        raise BadInput(f"unknown divergence {kind!r}{did_you_mean(kind, KINDS)}")
    if kind == "jsd" and not 0 < beta < 1:
        raise BadInput(
            f"beta is {beta}; it must be above 0 and below 1", fix="at its ends take a KL divergence"
        )
    _check_head("student", student)
    n_tokens, vocabulary = len(student.h_TD), len(student.w_VD)
    if mask_T is not None and (mask_T.shape != (n_tokens,) or mask_T.dtype != torch.bool):
        raise BadInput(f"mask_T is {_given(mask_T)}, not {[n_tokens]} of torch.bool")
    tensors = [*_logits(student).given, mask_T]
    if isinstance(teacher, TopK):
        _check_top_k(teacher, n_tokens, vocabulary, mask_T)
        tensors += teacher
    else:
        _check_head("teacher", teacher)
        if len(teacher.h_TD) != n_tokens:
            raise BadInput(f"the student has {n_tokens} positions, the teacher {len(teacher.h_TD)}")
        if len(teacher.w_VD) != vocabulary:
            raise BadInput(
                f"the student has {vocabulary} tokens of vocabulary, the teacher {len(teacher.w_VD)}",
                fix="cut padded heads to the tokens that both have",
            )
        tensors += _logits(teacher).given
    devices = {str(tensor.device) for tensor in tensors if tensor is not None}
    if len(devices) > 1:
        raise BadInput(f"the tensors are on different devices: {', '.join(sorted(devices))}")


def _check_head(name: str, head: Head) -> None:
    """Raise BadInput unless a head's tensors fit and its numbers are in their ranges."""
    h_TD, w_VD, bias_V, low_rank, softcap, logit_scale, temperature = head
    if any(isinstance(part, DTensor) for part in (h_TD, *(low_rank or ())[:1])):
        raise BadInput(f"of the {name} only the head may be cut over ranks", fix="give the rest whole")
    if h_TD.dim() != 2 or w_VD.dim() != 2 or h_TD.shape[1] != w_VD.shape[1]:
        shapes = f"h_TD {list(h_TD.shape)} and w_VD {list(w_VD.shape)}"
        raise BadInput(f"the {name}'s {shapes} do not fit", fix="give [T, D] and [V, D]")
    if len(w_VD) == 0:
        raise BadInput(f"the {name}'s vocabulary is empty")
    a_TR, b_VR = low_rank or (None, None)
    rank = None if a_TR is None else a_TR.shape[-1]
    expected = {
        "h_TD": (h_TD, h_TD.shape),
        "w_VD": (w_VD, w_VD.shape),
        "bias_V": (bias_V, (len(w_VD),)),
        "low_rank[0]": (a_TR, (len(h_TD), rank)),
        "low_rank[1]": (b_VR, (len(w_VD), rank)),
    }
    for part, (tensor, shape) in expected.items():
        if tensor is not None and (tensor.shape != shape or not tensor.is_floating_point()):
            raise BadInput(f"the {name}'s {part} is {_given(tensor)}, not {list(shape)} of a floating dtype")
    numbers = {"temperature": temperature, "logit_scale": logit_scale, "softcap": softcap}
    for part, number in numbers.items():
        if number is not None and not 0 < number < math.inf:
            raise BadInput(f"the {name}'s {part} is {number}; it must be above 0 and finite")


def _check_top_k(top: TopK, n_tokens: int, vocabulary: int, mask_T: Tensor | None) -> None:
    """Raise BadInput unless the rows are parts of a distribution."""
    token_TK, logprob_TK = top
    if token_TK.dim() != 2 or len(token_TK) != n_tokens or not token_TK.shape[1]:
        raise BadInput(f"token_TK is {_given(token_TK)}, not {[n_tokens, 'K']} of torch.int64")
    if token_TK.dtype != torch.int64 or logprob_TK.shape != token_TK.shape:
        raise BadInput(f"token_TK is {_given(token_TK)} and logprob_TK {_given(logprob_TK)}")
    if not logprob_TK.is_floating_point():
        raise BadInput(f"logprob_TK is {_given(logprob_TK)}, not of a floating dtype")
    counted_T1 = torch.ones_like(token_TK[:, :1], dtype=torch.bool) if mask_T is None else mask_T[:, None]
    ordered_TK = token_TK.sort(dim=1).values
    wrong = {
        f"is outside the vocabulary of {vocabulary} tokens": (token_TK < 0) | (token_TK >= vocabulary),
        "stands in its row twice": torch.cat(
            [torch.zeros_like(counted_T1), ordered_TK[:, 1:] == ordered_TK[:, :-1]], dim=1
        ),
        "begins a row of probabilities that sum to more than 1": (
            logprob_TK.double().logsumexp(dim=1, keepdim=True) > math.log1p(_OVER)
        ),
    }
    for what, is_wrong in wrong.items():
        place = (is_wrong & counted_T1).nonzero()
        if len(place):
            row, column = place[0].tolist()
            shown = ordered_TK if "twice" in what else token_TK
            raise BadInput(f"token {int(shown[row, column])} {what}", where=f"position {row}")


_OVER = 1e-2
"""How far above 1 probabilities may sum: log-probabilities may have been kept in few bits."""


def _given(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} of {tensor.dtype}"


# --- a teacher's k likeliest tokens ---


def _from_top_k(student: Head, teacher: TopK, measure: Measure, dtype: torch.dtype) -> Tensor:
    """The divergence on k + 1 outcomes."""
    answer = token_logprobs(
        student.h_TD,
        student.w_VD,
        teacher.token_TK[:, 0],
        bias_V=student.bias_V,
        low_rank=student.low_rank,
        softcap=student.softcap,
        logit_scale=student.logit_scale,
        temperature=student.temperature,
        want=(),
        candidate_TC=teacher.token_TK,
    )
    assert answer.candidate_TC is not None
    return divergence_on_top(answer.candidate_TC.to(dtype), teacher.logprob_TK.to(dtype), measure)


def divergence_on_top(log_p_NK: Tensor, log_q_NK: Tensor, measure: Measure) -> Tensor:
    """The divergence on K + 1 outcomes: K tokens, and all others together.

    Args:
        log_p_NK: the student's log-probabilities of these tokens, which get the gradient.
        log_q_NK: the teacher's, constants, of the same dtype.
        measure: which divergence.

    Returns:
        [N] in nats.
    """
    found_N: Tensor = _Outcomes.apply(measure, _with_tail(log_p_NK), _with_tail(log_q_NK))  # type: ignore[no-untyped-call]
    return found_N


def _with_tail(log_p_NK: Tensor) -> Tensor:
    """Log-probabilities, and that of all other tokens: log(1 - sum p), with 1 - sum p at least eps."""
    eps = torch.finfo(log_p_NK.dtype).eps
    log_known_N1 = log_p_NK.logsumexp(dim=1, keepdim=True).clamp(max=-eps)
    return torch.cat([log_p_NK, (-torch.expm1(log_known_N1)).log()], dim=1)


class _Outcomes(torch.autograd.Function):
    """The divergence of distributions whose log-probabilities are all there, and its gradient by log p."""

    @staticmethod
    def forward(ctx: Any, measure: Measure, log_p_NO: Tensor, log_q_NO: Tensor) -> Tensor:
        ctx.measure = measure
        ctx.save_for_backward(log_p_NO, log_q_NO)
        rate, other_rate = measure.rates(log_p_NO, log_q_NO)
        return rate.add_(other_rate).sum(dim=1).clamp_(min=0.0)

    @staticmethod
    def backward(ctx: Any, gradient_N: Tensor) -> tuple[Any, ...]:
        with torch.no_grad():
            gradient_NO = ctx.measure.rates(*ctx.saved_tensors)[0] * gradient_N[:, None]
        return None, first_only(gradient_NO), None
