"""The support of top-k and top-p: the smallest logit that is still in it, row by row.

    top-k   the k largest logits
    top-p   the smallest set of largest logits whose probability reaches p, at least one token

as samplers cut it: temperature first, then top-k, then top-p within what top-k left. Some rows at a time have
their logits side by side; the floor lies halfway between the last logit inside and the first outside, so that
a logit computed anew, with another rounding, stays on its side. Logits that equal the last one inside, up to
what rounding may do to them, are in.

Shape legend: N rows, V vocabulary; a block is R rows, K of them the largest logits of each row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gyrocompass.loss._chunked import part_of, row_blocks
from gyrocompass.loss._question import Logits, Picks
from gyrocompass.loss._tiles import Tiles, TileSize

BLOCK_ELEMENTS = 1 << 23
"""Logits side by side at a time: 32 MB in float32."""
FEW = 1024
"""Nuclei are looked for among so many of the largest logits before a row is sorted."""
TIE = 16
"""Logits are equal if they differ by no more than so many roundings of the largest one."""


def support_floor(logits: Logits, top_k: int, top_p: float) -> Tensor:
    """The floor of each row.

    Args:
        logits: without a floor.
        top_k: how many tokens at most; 0 for all.
        top_p: the share of the probability that the tokens reach; 1 for all.

    Returns:
        [N], for `Logits.floor_N`.
    """
    floors = [logits.h_ND.new_empty(0, dtype=logits.dtype)]
    for rows, _ in row_blocks(logits, no_picks(logits), BLOCK_ELEMENTS):
        floors.append(block_floor(part_of(logits, rows), top_k, top_p))
    return torch.cat(floors)


def no_picks(logits: Logits) -> Picks:
    """Where no single logits are wanted."""
    nothing = logits.h_ND.new_empty(0, dtype=torch.int64)
    return Picks(nothing, nothing)


def block_floor(block: Logits, top_k: int, top_p: float, size: TileSize | None = None) -> Tensor:
    """The floor of rows few enough to have their logits side by side, [R]."""
    tiles = Tiles(block, no_picks(block), keep=True, size=size)
    z_RV = torch.cat([torch.cat([tile.z_RK for tile in tiles.across(part)]) for part in tiles.columns], dim=1)
    return _floor(z_RV, top_k, top_p)


def _floor(z_RV: Tensor, top_k: int, top_p: float) -> Tensor:
    """The floor of rows whose logits are side by side."""
    vocabulary = z_RV.shape[1]
    n_largest = top_k if top_k and top_k < vocabulary else vocabulary
    lse_R = z_RV.logsumexp(dim=1) if n_largest == vocabulary else z_RV.topk(n_largest).values.logsumexp(dim=1)
    n_few = min(vocabulary, FEW, n_largest + 1)
    few_RK = z_RV.topk(n_few).values
    floor_R, found_R = _cut(few_RK, lse_R, n_largest, top_p, is_all=n_few == vocabulary)
    if not found_R.all():
        rest = (~found_R).nonzero().squeeze(1)
        sorted_RK = z_RV[rest].sort(dim=1, descending=True).values
        floor_R[rest] = _cut(sorted_RK, lse_R[rest], n_largest, top_p, is_all=True)[0]
    return floor_R


def _cut(z_RK: Tensor, lse_R: Tensor, n_largest: int, top_p: float, *, is_all: bool) -> tuple[Tensor, Tensor]:
    """Where to cut rows of descending logits, and whether the cut lies within what is given."""
    before_RK = (z_RK - lse_R[:, None]).exp().cumsum(dim=1).roll(1, dims=1)
    before_RK[:, 0] = 0.0
    is_in_RK = z_RK.isfinite() & (before_RK < top_p if top_p < 1.0 else True)
    is_in_RK[:, 0] = True
    last_R1 = is_in_RK[:, :n_largest].sum(dim=1, keepdim=True) - 1
    beyond_R1 = torch.full_like(z_RK[:, :1], -torch.inf) if is_all else z_RK[:, -1:]
    next_RK = torch.cat([z_RK[:, 1:], beyond_R1], dim=1)
    size_R1 = torch.maximum(z_RK[:, :1].abs(), z_RK.gather(1, last_R1).abs())
    is_apart_RK = z_RK - next_RK > TIE * torch.finfo(z_RK.dtype).eps * size_R1
    is_edge_RK = is_apart_RK & (torch.arange(z_RK.shape[1], device=z_RK.device) >= last_R1)
    edge_R1 = is_edge_RK.byte().argmax(dim=1, keepdim=True)
    inside_R, outside_R = z_RK.gather(1, edge_R1)[:, 0], next_RK.gather(1, edge_R1)[:, 0]
    floor_R = inside_R - (inside_R - outside_R) / 2
    everything = torch.finfo(z_RK.dtype).min
    return floor_R.masked_fill(outside_R.isneginf(), everything), is_edge_RK.any(dim=1) | is_all
