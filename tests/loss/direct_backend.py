"""What a backend is asked, answered from the definitions on full float64 logits: the oracle of every backend.

Shape legend: N rows, D hidden width, V vocabulary, R rank of the low-rank addition, P picks, K of a top list.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gyrocompass.loss._noise import gumbel
from gyrocompass.loss._question import Asks, Gradients, Logits, Needs, Picks, Slopes, Sums


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().double()


def full_logits(logits: Logits) -> tuple[Tensor, Tensor, Tensor]:
    """z, the slope dz/d(h w^T + bias) without the factor, and what is allowed: [N, V] each."""
    y_NV = _double(logits.h_ND) @ _double(logits.w_VD).T
    if logits.a_NR is not None and logits.b_VR is not None:
        y_NV = y_NV + _double(logits.a_NR) @ _double(logits.b_VR).T
    outside_V = torch.zeros(len(logits.w_VD), dtype=torch.bool)
    if logits.bias_V is not None:
        outside_V = logits.bias_V == -torch.inf
        y_NV = y_NV + torch.where(outside_V, 0.0, _double(logits.bias_V))
    softcap, scale, temperature = logits.rule
    y_NV = y_NV * scale
    slope_NV = torch.ones_like(y_NV)
    if softcap is not None:
        bent_NV = torch.tanh(y_NV / softcap)
        y_NV, slope_NV = softcap * bent_NV, 1 - bent_NV**2
    z_NV = y_NV / temperature
    allowed_NV = ~outside_V.expand(z_NV.shape)
    if logits.floor_N is not None:
        allowed_NV = allowed_NV & (z_NV >= _double(logits.floor_N)[:, None])
    return torch.where(outside_V, -torch.inf, z_NV), slope_NV, allowed_NV


def direct_sums(logits: Logits, picks: Picks, asks: Asks) -> Sums:
    z_NV, _, allowed_NV = full_logits(logits)
    in_z_NV = torch.where(allowed_NV, z_NV, -torch.inf)
    lowest = float(torch.finfo(logits.dtype).min)
    top_N = in_z_NV.amax(1).clamp(min=lowest)
    x_NV = torch.where(allowed_NV, z_NV - top_N[:, None], 0.0)
    e_NV = torch.where(allowed_NV, x_NV.exp(), 0.0)
    top = torch.topk(in_z_NV, min(asks.top, z_NV.shape[1]), dim=1) if asks.top else None
    drawn_N = key_N = None
    if asks.seed_N is not None:
        token_V = torch.arange(z_NV.shape[1]) + asks.first_token
        key_N, drawn_N = (in_z_NV + gumbel(asks.seed_N, token_V, torch.float64)).max(1)
    here_P = picks.token_P >= 0
    return Sums(
        top_N=top_N,
        exp_N=e_NV.sum(1),
        pick_P=torch.where(here_P, z_NV[picks.row_P, picks.token_P.clamp(min=0)], 0.0),
        exp_x_N=(e_NV * x_NV).sum(1) if asks.entropy else None,
        exp_sq_N=(e_NV**2).sum(1) if asks.sum_sq else None,
        z_N=torch.where(allowed_NV, z_NV, 0.0).sum(1) if asks.mean_logit else None,
        count_N=allowed_NV.sum(1).double() if asks.mean_logit else None,
        above_N=None if asks.threshold_N is None else (in_z_NV > _double(asks.threshold_N)[:, None]).sum(1),
        top_NK=None if top is None else top.values,
        top_token_NK=None if top is None else top.indices,
        drawn_N=drawn_N,
        drawn_key_N=key_N,
    )


def direct_gradients(
    logits: Logits, picks: Picks, slopes: Slopes, needs: Needs, *, magnitudes: bool = False
) -> Gradients:
    """The gradients; or the sums of their terms' magnitudes, which rounding errors scale with."""
    z_NV, bend_NV, allowed_NV = full_logits(logits)

    def column(slope_N: Tensor | None) -> Tensor | float:
        return 0.0 if slope_N is None else _double(slope_N)[:, None]

    x_NV = torch.where(allowed_NV, z_NV - _double(slopes.top_N)[:, None], 0.0)
    e_NV = x_NV.exp()
    inner_NV = column(slopes.a_N) + column(slopes.b_N) * x_NV + column(slopes.c_N) * e_NV
    dz_NV = torch.where(allowed_NV, e_NV * inner_NV + column(slopes.d_N), 0.0)
    here_P = picks.token_P >= 0
    dz_NV = dz_NV.index_put(
        (picks.row_P[here_P], picks.token_P[here_P]), _double(slopes.pick_P)[here_P], accumulate=True
    )
    dz_NV = torch.where(allowed_NV, dz_NV * bend_NV, 0.0)
    low_rank = needs.low_rank and logits.a_NR is not None and logits.b_VR is not None
    if magnitudes:
        dz_NV = dz_NV.abs()

    def factor(tensor: Tensor) -> Tensor:
        return _double(tensor).abs() if magnitudes else _double(tensor)

    return Gradients(
        dh_ND=dz_NV @ factor(logits.w_VD) if needs.h else None,
        dw_VD=dz_NV.T @ factor(logits.h_ND) if needs.w else None,
        dbias_V=dz_NV.sum(0) if needs.bias and logits.bias_V is not None else None,
        da_NR=dz_NV @ factor(logits.b_VR) if low_rank and logits.b_VR is not None else None,
        db_VR=dz_NV.T @ factor(logits.a_NR) if low_rank and logits.a_NR is not None else None,
    )
