"""The losses of a pair that are a function of one margin: how much more the chosen answer is preferred.

    d = s(y_c) - s(y_r)        value = h(d)

with s a score of an answer: a log-ratio with the reference (`preference.py`), also as another divergence than
the reverse KL sees it, or a log-probability alone (`reference_free.py`).

Shape legend: S sequences, P pairs.
"""

from __future__ import annotations

from typing import Annotated, Literal, assert_never

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from gyrocompass.core.errors import BadInput

Doubt = Annotated[float, Field(ge=0.0, lt=0.5)]
"""The probability that the two sides of a pair are swapped."""

PairLoss = Literal["sigmoid", "hinge", "ipo", "robust", "exo", "discopop"]
"""Losses that are a function of one margin."""

FDivergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]
"""What keeps the policy near the reference."""


def pair_loss(
    margin_P: Tensor,
    loss: PairLoss,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    discopop_tau: float = 0.05,
) -> Tensor:
    """The losses h of one margin d = s(y_c) - s(y_r), with z = beta d and eps the label smoothing.

        sigmoid     -(1 - eps) log sigmoid(z) - eps log sigmoid(-z)
        hinge       max(0, 1 - z)
        ipo         (d - 1 / (2 beta))^2
        robust      [-(1 - eps) log sigmoid(z) + eps log sigmoid(-z)] / (1 - 2 eps)
        exo         KL([sigmoid(z), sigmoid(-z)] || [1 - eps, eps])
        discopop    (1 - m) * -log sigmoid(z) + m exp(-z),  m = sigmoid(z / tau)

    Returns:
        [P].

    Raises:
        BadInput: a label smoothing with a loss that has none, or none with `exo`.

    >>> pair_loss(torch.zeros(1), "sigmoid", beta=0.1).item() == torch.tensor(2.0).log().item()
    True

    Source: in their order DPO, arXiv:2305.18290; SLiC, arXiv:2305.10425; IPO, arXiv:2310.12036, equation 17;
    robust DPO, arXiv:2403.00409; EXO, arXiv:2402.00856, equation 16; DiscoPOP, arXiv:2406.08414, equation 5.
    """
    if label_smoothing and loss in ("hinge", "ipo", "discopop"):
        raise BadInput(f"the loss {loss} has no label_smoothing", fix="leave it out")
    z_P = beta * margin_P
    kept_P, swapped_P = -F.logsigmoid(z_P), -F.logsigmoid(-z_P)
    match loss:
        case "sigmoid":
            return (1 - label_smoothing) * kept_P + label_smoothing * swapped_P
        case "hinge":
            return F.relu(1 - z_P)
        case "ipo":
            return (margin_P - 0.5 / beta).square()
        case "robust":
            return ((1 - label_smoothing) * kept_P - label_smoothing * swapped_P) / (1 - 2 * label_smoothing)
        case "exo":
            return _exo(z_P, label_smoothing)
        case "discopop":  # the product of m and exp(-z) in one exponent, where exp(-z) alone overflows
            mixed_P = z_P / discopop_tau
            return torch.sigmoid(-mixed_P) * kept_P + torch.exp(F.logsigmoid(mixed_P) - z_P)
    assert_never(loss)


def _exo(z_P: Tensor, epsilon: float) -> Tensor:
    """The reverse KL divergence of the policy's two outcomes from the labels'."""
    if not epsilon:
        raise BadInput("the loss exo needs label_smoothing above 0", fix="label_smoothing: 1.0e-3")
    labels = z_P.new_tensor([1 - epsilon, epsilon]).log()
    log_P2 = torch.stack([F.logsigmoid(z_P), F.logsigmoid(-z_P)], dim=1)
    return (log_P2.exp() * (log_P2 - labels)).sum(dim=1)


def f_scores(log_ratio_S: Tensor, f_divergence: FDivergence, f_alpha: float) -> Tensor:
    """f'(pi / pi_ref) from the log-ratio, without the constants that a margin cancels; see `dpo`, [S]."""
    match f_divergence:
        case "reverse_kl":
            return log_ratio_S
        case "forward_kl":
            return -torch.expm1(-log_ratio_S)
        case "js":
            return F.logsigmoid(log_ratio_S)
        case "alpha":
            return -torch.expm1(-f_alpha * log_ratio_S) / f_alpha
    assert_never(f_divergence)
