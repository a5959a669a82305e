"""The primitive: one pass over the head gives every log-probability the system lives on.

    h [T, D], w [V, D], targets [T]  --token_logprobs-->  TokenLogProbs, one entry per token, no mean

Training, scoring, evaluation and serving all call this one function, so their numbers agree. It takes hidden
states and the head's weight instead of logits, so that a backend never needs to hold [T, V] of them. Ignored
positions are taken out before any product: they cost nothing and have no gradient.

Left out: any mean or mask weight (`reduce.py` has the only mean), logits as an output (objectives never see
them), and anything about models, such as where a head is found.

Shape legend: T tokens, N counted tokens, D hidden width, V vocabulary, C candidate tokens per position,
R rank of a low-rank addition to the head.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from gyrocompass.core.errors import BadInput, did_you_mean
from gyrocompass.loss._backends import BACKENDS
from gyrocompass.loss._expected import expected
from gyrocompass.loss._functional import check_no_tangent, functional_forward, under_transform
from gyrocompass.loss._ops import Call, Inputs, Settings, token_logprobs_op
from gyrocompass.loss._reference import reference
from gyrocompass.loss._sharded import local_part, on_any_rank, part_of_head
from gyrocompass.loss.signal import IGNORE_INDEX, Expect, TokenLogProbs

Want = Literal["entropy", "mean_logit", "sum_sq", "rank"]
WANTS: tuple[Want, ...] = get_args(Want)


def token_logprobs(
    h_TD: Tensor,
    w_VD: Tensor,
    target_T: Tensor,
    *,
    bias_V: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    ignore_index: int = IGNORE_INDEX,
    want: Collection[str] = WANTS,
    candidate_TC: Tensor | None = None,
    n_top: int = 0,
    seed_T: Tensor | None = None,
    expect: Expect | None = None,
    backend: str = "auto",
    invariant: bool = False,
    check_finite: bool = False,
) -> TokenLogProbs:
    """Log-probabilities of target tokens and their fused statistics, differentiable together.

        z = softcap * tanh((h w^T + a b^T + bias) * logit_scale / softcap) / temperature
        logprob_t = z[t, target_t] - lse_t        lse_t = log sum_v exp(z[t, v])

    The arithmetic and the answer are float64 if any input is float64, else float32: narrower inputs are
    widened exactly, tile by tile, so a bf16 model gets float32 log-probabilities. Inputs may be of different
    dtypes; gradients come back in each input's own. An autocast around the call changes nothing here.

    A head cut over ranks: `w_VD` (with `bias_V` and b) as a DTensor that is sharded along the vocabulary on a
    mesh of one dimension. Each rank then gives the same hidden states and targets and gets the whole
    vocabulary's numbers; gradients of the head are sharded as it is.

    Args:
        h_TD: hidden states after the final norm, [T, D], any layout.
        w_VD: the head's weight, [V, D]; may be the embedding itself (tied), may be frozen.
        target_T: int64 [T]: the token each position predicts, or `ignore_index`.
        bias_V: the head's bias, [V]. An entry of -inf takes its token out of the vocabulary (padding):
            probability 0, no gradient through it, not counted in the mean logit. A target taken out has
            log-probability -inf.
        low_rank: a [T, R] and b [V, R], added as a b^T: LoRA on the head, whose merged weight is never made.
        softcap: the bound of a tanh on the logits (Gemma 2); None for none.
        logit_scale: a factor on the logits, before the softcap.
        temperature: the divisor of the logits, after the softcap.
        top_k: keep the k largest logits of each position and renormalise; a target that is not among them has
            log-probability -inf. Logits equal to the k-th are in.
        top_p: keep the smallest set of largest logits whose probability reaches p (after `top_k`), at least
            one, and renormalise: the distribution that a sampler with these settings draws from.
        ignore_index: positions with this target are not computed, and neither are such candidates.
        want: which of "entropy", "mean_logit", "sum_sq", "rank" to compute; each costs a pass over the tiles.
        candidate_TC: int64 [T, C]: tokens whose log-probability is wanted at each position too.
        n_top: how many of the largest log-probabilities, with their tokens, are wanted at each position.
        seed_T: int64 [T]: draw a token at each position from softmax(z), by Gumbel-max with noise that
            depends on the seed and the token id alone (`_noise.py`).
        expect: the scalar loss that will be taken of the answer, if it is known and separable per token: its
            gradient is then computed along with the answer, in 3 matrix products instead of 4. Any other
            gradient that comes is right too; it costs the usual second pass.
        backend: "auto" (the fastest that takes the inputs), "reference" (full logits, allows derivatives of
            any order), "chunked", "native" or "triton".
        invariant: every position's numbers, and its gradient with respect to h, are the same bits whatever
            positions it is computed beside (`_invariant.py`); slower.
        check_finite: look for NaN and infinity in the inputs first.

    Returns:
        `TokenLogProbs`: [T] each, 0 at ignored positions.

    Raises:
        BadInput: shapes, dtypes or devices that do not fit, a number out of its range, a name in `want` or a
            backend that does not exist, a backend that cannot take the inputs, a target or candidate outside
            the vocabulary, a bias that leaves no token in it, a forward-mode derivative, with `check_finite`
            a NaN or an infinity (the position and the value are named).

    >>> h, w = torch.zeros(3, 4), torch.zeros(8, 4)
    >>> signal = token_logprobs(h, w, torch.tensor([1, -100, 7]), want=["entropy"])
    >>> [round(value, 4) for value in signal.logprob_T.tolist()]     # -log 8
    [-2.0794, 0.0, -2.0794]
    """
    shard = part_of_head(w_VD)
    a_TR, b_VR = _pair(low_rank)
    bias_V, b_VR = local_part("bias_V", bias_V, w_VD), local_part("low_rank[1]", b_VR, w_VD)
    w_VD = shard.w_VD
    inputs = Inputs(h_TD, w_VD, bias_V, a_TR, b_VR, target_T, candidate_TC, seed_T)
    _check_tensors(inputs)
    if check_finite:
        _check_finite(inputs, ignore_index, shard.group)
    settings = Settings(
        softcap=0.0 if softcap is None else softcap,
        logit_scale=logit_scale,
        temperature=temperature,
        ignore_index=ignore_index,
        want=",".join(want),
        n_top=n_top,
        top_k=top_k or 0,
        top_p=1.0 if top_p is None else top_p,
        backend=backend,
        invariant=invariant,
        group=shard.group,
        first_token=shard.first_token,
    )
    _check_settings(settings, softcap, top_k, want)
    if backend == "reference":
        return _by_reference(inputs, settings)
    check_no_tangent(inputs)
    if under_transform():
        return token_logprobs_op(inputs, settings, functional_forward)
    if expect is not None and not torch.compiler.is_compiling():
        answer = expected(inputs, settings, expect)
        if answer is not None:
            return answer
    return token_logprobs_op(inputs, settings)


def _by_reference(inputs: Inputs, settings: Settings) -> TokenLogProbs:
    """Full logits of the counted rows, by operations that autograd knows."""
    call = Call(inputs, settings._replace(backend="chunked"))
    with torch.autocast(inputs.h_TD.device.type, enabled=False):
        answer = reference(call.question, settings.top_k, settings.top_p)
    return TokenLogProbs(*(None if field is None else call.spread(field) for field in answer))  # type: ignore[arg-type]


def _pair(low_rank: tuple[Tensor, Tensor] | None) -> tuple[Tensor | None, Tensor | None]:
    """Both factors, or neither."""
    if low_rank is None:
        return None, None
    if (
        not isinstance(low_rank, (tuple, list))
        or [isinstance(part, Tensor) for part in low_rank] != [True] * 2
    ):
        given = type(low_rank).__name__
        if isinstance(low_rank, (tuple, list)):
            given = f"({', '.join(type(part).__name__ for part in low_rank)})"
        raise BadInput(f"low_rank is {given}, not a pair of tensors", fix="give a [T, R] and b [V, R]")
    a_TR, b_VR = low_rank
    return a_TR, b_VR


def _check_tensors(inputs: Inputs) -> None:
    """Raise BadInput unless shapes, dtypes and devices fit together."""
    h_TD, w_VD, bias_V, a_TR, b_VR, target_T, candidate_TC, seed_T = inputs
    if any(isinstance(tensor, DTensor) for tensor in inputs):
        raise BadInput(
            "only the head may be cut over ranks", fix="give hidden states and targets whole: full_tensor()"
        )
    if h_TD.dim() != 2 or w_VD.dim() != 2 or h_TD.shape[1] != w_VD.shape[1]:
        raise BadInput(
            f"h_TD {list(h_TD.shape)} and w_VD {list(w_VD.shape)} do not fit",
            fix="give [T, D] and [V, D]; flatten the rows of a batch first",
        )
    n_tokens, vocabulary = h_TD.shape[0], w_VD.shape[0]
    if vocabulary == 0:
        raise BadInput(f"the head's vocabulary is empty: w_VD is {list(w_VD.shape)}")
    floating: dict[str, tuple[Tensor | None, list[Any]]] = {
        "h_TD": (h_TD, [n_tokens, "D"]),
        "w_VD": (w_VD, [vocabulary, "D"]),
        "bias_V": (bias_V, [vocabulary]),
        "low_rank[0]": (a_TR, [n_tokens, "R"]),
        "low_rank[1]": (b_VR, [vocabulary, "R" if a_TR is None or a_TR.dim() != 2 else a_TR.shape[1]]),
    }
    for name, (tensor, sizes) in floating.items():
        if tensor is not None and not (_fits(tensor, sizes) and tensor.is_floating_point()):
            raise BadInput(f"{name} is {_given(tensor)}, not {_shape(sizes)} of a floating dtype")
    integers: dict[str, tuple[Tensor | None, list[Any]]] = {
        "target_T": (target_T, [n_tokens]),
        "candidate_TC": (candidate_TC, [n_tokens, "C"]),
        "seed_T": (seed_T, [n_tokens]),
    }
    for name, (tensor, sizes) in integers.items():
        if tensor is not None and not (_fits(tensor, sizes) and tensor.dtype == torch.int64):
            raise BadInput(f"{name} is {_given(tensor)}, not {_shape(sizes)} of torch.int64")
    given = {name: tensor for name, tensor in zip(_ARGUMENTS, inputs, strict=True) if tensor is not None}
    if any(tensor.device != h_TD.device for tensor in given.values()):
        places = [f"{name} {list(tensor.shape)} on {tensor.device}" for name, tensor in given.items()]
        raise BadInput(f"the tensors are on different devices: {', '.join(places)}")


_ARGUMENTS = ("h_TD", "w_VD", "bias_V", "low_rank[0]", "low_rank[1]", "target_T", "candidate_TC", "seed_T")
"""The tensors of `Inputs` as the caller gave them."""


def _fits(tensor: Tensor, sizes: list[Any]) -> bool:
    """Whether a shape is as wanted; a letter is any size."""
    return tensor.dim() == len(sizes) and all(
        isinstance(wanted, str) or size == wanted for size, wanted in zip(tensor.shape, sizes, strict=True)
    )


def _shape(sizes: list[Any]) -> str:
    return f"[{', '.join(str(size) for size in sizes)}]"


def _given(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} of {tensor.dtype}"


def _check_settings(
    settings: Settings, softcap: float | None, top_k: int | None, want: Collection[str]
) -> None:
    """Raise BadInput unless the numbers make sense and the names exist."""
    numbers = {"temperature": settings.temperature, "logit_scale": settings.logit_scale, "softcap": softcap}
    for name, number in numbers.items():
        if number is not None and not 0 < number < math.inf:
            fix = "give None for no softcap" if name == "softcap" else None
            raise BadInput(f"{name} is {number}; it must be above 0 and finite", fix=fix)
    if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
        fix = "give None to keep every token"
        raise BadInput(f"top_k is {top_k}; it must be a whole number, at least 1", fix=fix)
    if not 0 < settings.top_p <= 1:
        raise BadInput(f"top_p is {settings.top_p}; it must be above 0 and at most 1")
    if not isinstance(settings.n_top, int) or settings.n_top < 0:
        raise BadInput(f"n_top is {settings.n_top}; it must be a whole number, 0 or more")
    for name in want:
        if name not in WANTS:
            raise BadInput(f"unknown statistic {name!r} in `want`{did_you_mean(name, WANTS)}")
    names = ["auto", "reference", *BACKENDS]
    if settings.backend not in names:
        raise BadInput(f"unknown backend {settings.backend!r}{did_you_mean(settings.backend, names)}")
    if settings.group and settings.backend == "reference":
        raise BadInput("a head cut over ranks takes no reference backend")


def _check_finite(inputs: Inputs, ignore_index: int, group: str) -> None:
    """Raise BadInput that names the first NaN or infinity; ignored positions do not count.

    With a head cut over ranks all of them raise, wherever it is.
    """
    ignored_T = inputs.target_T == ignore_index
    tensors = {
        "hidden states": inputs.h_TD.detach().masked_fill(ignored_T[:, None], 0.0),
        "head weight": inputs.w_VD,
        "bias": None if inputs.bias_V is None else inputs.bias_V.masked_fill(inputs.bias_V.isneginf(), 0.0),
        "low_rank a": None if inputs.a_TR is None else inputs.a_TR.masked_fill(ignored_T[:, None], 0.0),
        "low_rank b": inputs.b_VR,
    }
    bad = {name: part for name, part in tensors.items() if part is not None and not part.isfinite().all()}
    elsewhere = bool(group) and on_any_rank(bool(bad), group, inputs.h_TD.device)
    for name, tensor in bad.items():
        is_bad = ~tensor.isfinite()
        place = is_bad.nonzero()[0].tolist()
        n_rows = int(is_bad.view(len(tensor), -1).any(dim=1).sum())
        raise BadInput(
            f"{name}: {float(tensor[tuple(place)])} in row {place[0]} of {_given(tensor)}",
            where=f"first at {place}, {n_rows} such rows in all",
        )
    if elsewhere:
        raise BadInput("another rank's part of the head has a NaN or an infinity")
