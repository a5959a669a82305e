"""`torch.nn.functional.linear_cross_entropy` on the one primitive, for those who train elsewhere.

    input [N, D], linear_weight [C, D], target --linear_cross_entropy--> loss

Names, order, defaults and results are those of torch 2.13, for every combination of its arguments, and no
logits are ever held. What cross entropy needs of a row z of logits is two numbers, its log-normaliser and a
weighted sum of its entries; the second is linear in z, so that it needs no logits either:

    sum_v c_v (lse - z_v) = lse sum_v c_v - h . (sum_v c_v w_v) - sum_v c_v b_v

Where it differs, on purpose:

- The loss is float32 for bf16 and float16 inputs (float64 if any input is float64), not rounded to theirs.
- The mean over nothing (no rows, all rows ignored, all class weights 0) is 0 with zero gradients, not NaN.
- A bias of -inf takes its class out of the vocabulary, and label smoothing spreads over the classes left.
- `options` is accepted and changes nothing: the tiles are the engine's choice, and no argument makes it fall
  back on full logits.
- An autocast around the call changes nothing.

Left out: a gradient to the class weights, and `torch.jit`. The reduction stands here, and not in `reduce.py`,
because it is part of the signature that is copied.

Shape legend: N rows, D hidden width, C classes (the vocabulary), K1.. dimensions of a K-dimensional loss.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from gyrocompass.core.errors import BadInput, did_you_mean
from gyrocompass.loss.logprob import token_logprobs
from gyrocompass.loss.signal import IGNORE_INDEX, TokenLogProbs

if TYPE_CHECKING:
    from torch.nn import LinearCrossEntropyOptions

REDUCTIONS = ("none", "mean", "sum")
_BLOCK = 4096
"""Rows of the head that are widened at a time, so that a bf16 head is never copied to float32 whole."""


class _Position(NamedTuple):
    """One linear layer of a K-dimensional loss, with its targets; the whole of an ordinary loss."""

    h_ND: Tensor
    w_CD: Tensor
    bias_C: Tensor | None
    weight_C: Tensor | None
    target: Tensor
    """[N] of class indices or [N, C] of probabilities."""
    smoothing: float
    ignored: int

    @property
    def soft(self) -> bool:
        """Whether the targets are probabilities."""
        return self.target.dim() == 2

    @property
    def counted(self) -> Tensor:
        """[N]: the rows that are computed."""
        return self.target != self.ignored

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the arithmetic and of the loss."""
        given = (self.h_ND, self.w_CD) if self.bias_C is None else (self.h_ND, self.w_CD, self.bias_C)
        return torch.float64 if any(tensor.dtype == torch.float64 for tensor in given) else torch.float32


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: LinearCrossEntropyOptions | None = None,
) -> Tensor:
    """Cross entropy between the softmax of a linear layer and a target, without the layer's output.

        z = linear_weight @ input + linear_bias        loss = -sum_v q_v weight_v log softmax(z)_v

    Here q is the target's distribution (1 at a class index), mixed with the uniform one by label smoothing.

    Args:
        input: [D] or [N, D].
        linear_weight: [C, D], or [C, K1, .., D] for a K-dimensional loss.
        target: int64 class indices, [] or [N] or [N, K1, ..]; or probabilities, [C] or [N, C] or
            [N, C, K1, ..] in floating point.
        linear_bias: [C] or [C, K1, ..].
        weight: [C], what each class weighs; a constant.
        reduction: "none", "mean" (divided by the weights of the targets, or by the number of losses if the
            targets are probabilities) or "sum".
        ignore_index: class index of rows that are not computed; None is -100. Not with probabilities.
        label_smoothing: the share of the uniform distribution in the target.
        options: accepted for the signature's sake.

    Returns:
        The loss, in float32 or float64: a scalar, or for "none" [] or [N] or [N, K1, ..].

    Raises:
        BadInput: shapes or dtypes that do not fit, a class index outside the vocabulary, an unknown
            reduction, label smoothing outside [0, 1], class weights that want a gradient.

    >>> h, w = torch.zeros(2, 4), torch.zeros(8, 4)
    >>> round(float(linear_cross_entropy(h, w, torch.tensor([3, -100]))), 4)     # log 8
    2.0794

    Source: `torch.nn.functional.linear_cross_entropy` and `cross_entropy` of torch 2.13.
    """
    _check_arguments(reduction, label_smoothing)
    soft = _check_shapes(input, linear_weight, target, linear_bias, weight)
    if soft and ignore_index is not None:
        raise BadInput("ignore_index has no meaning with probabilities", fix="leave out ignore_index")
    positions = _positions(input, linear_weight, target, linear_bias, weight)
    ignored = IGNORE_INDEX if ignore_index is None else ignore_index
    positions = [position._replace(smoothing=label_smoothing, ignored=ignored) for position in positions]
    weights = [_target_weight(position) for position in positions]
    divisor = None if reduction == "none" else _divisor(reduction, weights)
    values = [
        _against_probabilities(position, divisor) if soft else _against_indices(position, weight_N, divisor)
        for position, weight_N in zip(positions, weights, strict=True)
    ]
    value = torch.stack(values, dim=1).reshape((*input.shape[:-1], *linear_weight.shape[1:-1]))
    return value if divisor is None else value.sum() / divisor


def _positions(
    h: Tensor, w: Tensor, target: Tensor, bias: Tensor | None, weight_C: Tensor | None
) -> list[_Position]:
    """Each position of a K-dimensional loss is a linear layer of its own, with its own targets."""
    h_ND, target_Nx = (h, target) if h.dim() == 2 else (h[None], target[None])
    w_CKD = w[:, None] if w.dim() == 2 else w.flatten(1, -2)
    classes, n_positions, _ = w_CKD.shape
    bias_CK = None if bias is None else bias.reshape(classes, n_positions)
    kept = 2 if target.is_floating_point() else 1
    target_NxK = target_Nx.reshape(*target_Nx.shape[:kept], n_positions)
    return [
        _Position(
            h_ND=h_ND,
            w_CD=w_CKD[:, k],
            bias_C=None if bias_CK is None else bias_CK[:, k],
            weight_C=weight_C,
            target=target_NxK[..., k],
            smoothing=0.0,
            ignored=IGNORE_INDEX,
        )
        for k in range(n_positions)
    ]


def _target_weight(position: _Position) -> Tensor:
    """What each row weighs in the mean, [N]: its class's weight, 0 if it is ignored, 1 for probabilities."""
    if position.soft:
        return torch.ones(len(position.target), dtype=position.dtype, device=position.h_ND.device)
    counted_N = position.counted
    weight_N = counted_N.to(position.dtype)
    if position.weight_C is None:
        return weight_N
    return weight_N * position.weight_C.to(position.dtype)[position.target.where(counted_N, 0)]


def _divisor(reduction: str, weights: list[Tensor]) -> Tensor:
    """What the sum of the values is divided by; a mean over nothing divides its 0 by 1."""
    total = torch.stack(weights).sum()
    return torch.ones_like(total) if reduction == "sum" else total.where(total != 0, 1.0)


def _against_indices(position: _Position, weight_N: Tensor, divisor: Tensor | None) -> Tensor:
    """Each row's loss, [N]; 0 where it is ignored."""
    smoothing, weighted = position.smoothing, position.weight_C is not None
    c_C = _smoothing_weights(position) if smoothing > 0 and weighted else None

    def of_signal(signal: TokenLogProbs) -> Tensor:
        """The loss, but for the weighted sum of logits, which comes from elsewhere."""
        value_N = -weight_N * signal.logprob_T
        if signal.mean_logit_T is not None:
            return (1 - smoothing) * value_N + smoothing * (signal.lse_T - signal.mean_logit_T)
        return value_N if c_C is None else (1 - smoothing) * value_N + smoothing * c_C.sum() * signal.lse_T

    signal = token_logprobs(
        position.h_ND,
        position.w_CD,
        position.target,
        bias_V=position.bias_C,
        ignore_index=position.ignored,
        want=["mean_logit"] if smoothing > 0 and not weighted else [],
        expect=None if divisor is None else lambda signal: of_signal(signal).sum() / divisor,
    )
    value_N = of_signal(signal)
    return value_N if c_C is None else value_N - smoothing * _weighted_logits(position, c_C)


def _smoothing_weights(position: _Position) -> Tensor:
    """What the uniform distribution puts on each class, times the class's weight, [C]."""
    assert position.weight_C is not None
    c_C = position.weight_C.to(position.dtype)
    if position.bias_C is None:
        return c_C / len(c_C)
    allowed_C = position.bias_C != -torch.inf
    return c_C * allowed_C / allowed_C.sum()


def _weighted_logits(position: _Position, c_C: Tensor) -> Tensor:
    """sum_v c_v z_v of each row, [N], with z_v only where c_v is not 0; 0 in ignored rows."""
    blocks = zip(c_C.split(_BLOCK), position.w_CD.split(_BLOCK), strict=True)
    pooled_D = torch.stack([c @ w.to(c.dtype) for c, w in blocks]).sum(0)
    kept_M = position.counted.nonzero().squeeze(1)
    z_M = position.h_ND.index_select(0, kept_M).to(c_C.dtype) @ pooled_D
    if position.bias_C is not None:
        z_M = z_M + c_C @ position.bias_C.to(c_C.dtype).where(c_C != 0, 0.0)
    return c_C.new_zeros(len(position.target)).index_copy(0, kept_M, z_M)


def _against_probabilities(position: _Position, divisor: Tensor | None) -> Tensor:
    """Each row's loss, [N]. The targets are as large as logits would be, so the head is widened whole."""
    h_ND, w_CD, bias_C, dtype = position.h_ND, position.w_CD, position.bias_C, position.dtype
    n_rows, n_classes = position.target.shape
    q_NC = position.target.to(dtype) * (1 - position.smoothing) + position.smoothing / n_classes
    if position.weight_C is not None:
        q_NC = q_NC * position.weight_C.to(dtype)
    sum_N = q_NC.sum(1)
    constant_N = sum_N.detach()
    lse_N = token_logprobs(
        h_ND,
        w_CD,
        torch.zeros(n_rows, dtype=torch.int64, device=h_ND.device),
        bias_V=bias_C,
        want=[],
        expect=None if divisor is None else lambda signal: (signal.lse_T * constant_N).sum() / divisor,
    ).lse_T
    z_N = (h_ND.to(dtype) * (q_NC @ w_CD.to(dtype))).sum(1)
    if bias_C is not None:
        z_N = z_N + q_NC @ bias_C.to(dtype)
    return lse_N * sum_N - z_N


def _check_arguments(reduction: str, label_smoothing: float) -> None:
    """Raise BadInput for a reduction or a smoothing that does not exist."""
    if reduction not in REDUCTIONS:
        raise BadInput(f"unknown reduction {reduction!r}{did_you_mean(reduction, REDUCTIONS)}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise BadInput(f"label_smoothing is {label_smoothing}; it is a share, from 0 to 1")


def _check_shapes(h: Tensor, w: Tensor, target: Tensor, bias: Tensor | None, weight: Tensor | None) -> bool:
    """Raise BadInput unless everything fits together; answer whether the targets are probabilities."""
    if h.dim() not in (1, 2) or w.dim() < 2 or h.shape[-1] != w.shape[-1]:
        raise BadInput(
            f"input {list(h.shape)} and linear_weight {list(w.shape)} do not fit",
            fix="give [D] or [N, D] and [C, .., D]; flatten the rows of a batch first",
        )
    rows, classes, inner = list(h.shape[:-1]), w.shape[0], list(w.shape[1:-1])
    if inner and not rows:
        raise BadInput(f"linear_weight {list(w.shape)} needs an input of [N, D], not {list(h.shape)}")
    if bias is not None and list(bias.shape) != [classes, *inner]:
        raise BadInput(f"linear_bias is {list(bias.shape)}, not {[classes, *inner]}")
    if weight is not None and list(weight.shape) != [classes]:
        raise BadInput(f"weight is {list(weight.shape)}, not [{classes}], one for each class")
    if weight is not None and weight.requires_grad and torch.is_grad_enabled():
        raise BadInput("class weights are constants here", where="weight", fix="give weight.detach()")
    soft = list(target.shape) == [*rows, classes, *inner]
    if not soft and list(target.shape) != [*rows, *inner]:
        fits = f"{[*rows, *inner]} class indices or {[*rows, classes, *inner]} probabilities"
        raise BadInput(f"target is {list(target.shape)}, not {fits}")
    if target.is_floating_point() != soft or not (soft or target.dtype == torch.int64):
        kind = "probabilities are floating point" if soft else "class indices are torch.int64"
        raise BadInput(f"target is {list(target.shape)} of {target.dtype}; {kind}")
    return soft
