"""How far losses and gradients are from float64, whatever the size of the head.

The exact values are made a part of the vocabulary at a time, and compared as they come, so that the float64
copy of a large head never exists.

Shape legend: T tokens, D hidden width, V vocabulary, K tokens of one part of it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from loss_contenders import Loss
from torch import Tensor

_PART = 8192


class Errors(NamedTuple):
    """Against float64."""

    nll_nats: float
    """The largest error of a token's loss (of the mean, where a contender gives nothing else)."""
    dh: float
    """Norm of the gradient's error over the norm of the gradient."""
    dw: float


def errors(loss_T: Loss, h_TD: Tensor, w_VD: Tensor, target_T: Tensor) -> Errors:
    """Errors of the losses, and of the gradients of their mean."""
    h_TD, w_VD = h_TD.detach().requires_grad_(), w_VD.detach().requires_grad_()
    losses = loss_T(h_TD, w_VD, target_T)
    dh_TD, dw_VD = torch.autograd.grad(losses.mean(), (h_TD, w_VD))
    with torch.no_grad():
        wide_TD = h_TD.double()
        lse_T = _log_normaliser(wide_TD, w_VD)
        exact_T = lse_T - (wide_TD * w_VD[target_T].double()).sum(1)
        if losses.dim() == 0:
            exact_T = exact_T.mean()
        dh, dw = _gradient_errors(wide_TD, w_VD, target_T, lse_T, dh_TD, dw_VD)
        return Errors(float((losses.double() - exact_T).abs().max()), dh, dw)


def _log_normaliser(h_TD: Tensor, w_VD: Tensor) -> Tensor:
    lse_T = h_TD.new_full((len(h_TD),), -torch.inf)
    for w_KD in w_VD.split(_PART):
        lse_T = torch.logaddexp(lse_T, (h_TD @ w_KD.double().T).logsumexp(1))
    return lse_T


def _gradient_errors(
    h_TD: Tensor, w_VD: Tensor, target_T: Tensor, lse_T: Tensor, dh_TD: Tensor, dw_VD: Tensor
) -> tuple[float, float]:
    """Relative errors of dh and of dw, where the exact dz is (p - [v = target]) / T."""
    exact_dh_TD = torch.zeros_like(h_TD)
    off_sq = norm_sq = 0.0
    for start in range(0, len(w_VD), _PART):
        w_KD = w_VD[start : start + _PART].double()
        dz_TK = (h_TD @ w_KD.T).sub_(lse_T[:, None]).exp_()
        (row_P,) = ((target_T >= start) & (target_T < start + len(w_KD))).nonzero(as_tuple=True)
        dz_TK[row_P, target_T[row_P] - start] -= 1.0
        dz_TK /= len(h_TD)
        exact_dh_TD.addmm_(dz_TK, w_KD)
        exact_dw_KD = dz_TK.T @ h_TD
        norm_sq += float(exact_dw_KD.square().sum())
        off_sq += float(exact_dw_KD.sub_(dw_VD[start : start + _PART]).square_().sum())
    dh = float((dh_TD - exact_dh_TD).norm() / exact_dh_TD.norm())
    return dh, (off_sq / norm_sq) ** 0.5
