"""The support of top-k and top-p: the smallest logit that is still in it, row by row.

    top-k   the k largest logits
    top-p   the smallest set of largest logits whose probability reaches p, at least one token

as samplers cut it: temperature first, then top-k, then top-p within what top-k left. Some rows at a time have
their logits side by side; the floor lies halfway between the last logit inside and the first outside, so that
a logit computed anew, with another rounding, stays on its side. Logits that equal the last one inside, up to
what rounding may do to them, are in.

Where the vocabulary is cut over ranks, these give each other the largest logits of their parts, as many as
are needed: k of them for top-k, FEW for top-p, all of a row whose nucleus is wider.

Shape legend: N rows, V vocabulary; a block is R rows, K of them the largest logits of each row.
"""

from __future__ import annotations

from typing import Protocol

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


class Ranks(Protocol):
    """Those who hold the other parts of the vocabulary; all of them ask alike."""

    def sizes(self, own: Tensor) -> list[int]:
        """How long everybody's tensor is."""

    def side_by_side(self, own_RK: Tensor) -> Tensor:
        """Everybody's columns, [R, K of all]."""


def support_floor(logits: Logits, top_k: int, top_p: float, ranks: Ranks | None = None) -> Tensor:
    """The floor of each row.

    Args:
        logits: without a floor.
        top_k: how many tokens at most; 0 for all.
        top_p: the share of the probability that the tokens reach; 1 for all.
        ranks: who holds the other parts of the vocabulary; None: there are none.

    Returns:
        [N], for `Logits.floor_N`.
    """
    floors = [logits.h_ND.new_empty(0, dtype=logits.dtype)]
    own = len(logits.w_VD)
    widest = own if ranks is None else max(ranks.sizes(logits.w_VD))
    for rows, _ in row_blocks(logits, no_picks(logits), max(1, BLOCK_ELEMENTS // widest) * own):
        floors.append(block_floor(part_of(logits, rows), top_k, top_p, ranks))
    return torch.cat(floors)


def no_picks(logits: Logits) -> Picks:
    """Where no single logits are wanted."""
    nothing = logits.h_ND.new_empty(0, dtype=torch.int64)
    return Picks(nothing, nothing)


def block_floor(
    block: Logits, top_k: int, top_p: float, ranks: Ranks | None = None, size: TileSize | None = None
) -> Tensor:
    """The floor of rows few enough to have their logits side by side, [R]."""
    tiles = Tiles(block, no_picks(block), keep=True, size=size)
    z_RV = torch.cat([torch.cat([tile.z_RK for tile in tiles.across(part)]) for part in tiles.columns], dim=1)
    return _floor(_Rows(z_RV, ranks), top_k, top_p)


class _Rows:
    """Some rows of logits, this rank's part of them side by side."""

    def __init__(self, z_RV: Tensor, ranks: Ranks | None) -> None:
        self.z_RV, self._ranks = z_RV, ranks
        self._sizes = [z_RV.shape[1]] if ranks is None else ranks.sizes(z_RV.T)
        self.vocabulary = sum(self._sizes)

    def largest(self, n: int, row_R: Tensor | None = None) -> Tensor:
        """The n largest logits of all rows, or of some, descending, [R, n]."""
        z_RV = self.z_RV if row_R is None else self.z_RV[row_R]
        if self._ranks is None:
            everything = n == self.vocabulary
            return z_RV.sort(dim=1, descending=True).values if everything else z_RV.topk(n).values
        each = min(n, max(self._sizes))  # a part that has fewer is made as wide
        own_RK = z_RV.topk(min(n, z_RV.shape[1])).values
        own_RK = torch.nn.functional.pad(own_RK, (0, each - own_RK.shape[1]), value=-torch.inf)
        return self._ranks.side_by_side(own_RK).topk(n).values

    def logsumexp(self) -> Tensor:
        """Over the whole vocabulary, [R]."""
        own_R = self.z_RV.logsumexp(dim=1)
        return own_R if self._ranks is None else self._ranks.side_by_side(own_R[:, None]).logsumexp(dim=1)


def _floor(given: _Rows, top_k: int, top_p: float) -> Tensor:
    """The floor of rows whose logits are side by side."""
    vocabulary = given.vocabulary
    n_largest = top_k if top_k and top_k < vocabulary else vocabulary
    lse_R = given.logsumexp() if n_largest == vocabulary else given.largest(n_largest).logsumexp(dim=1)
    n_few = min(vocabulary, FEW, n_largest + 1)
    floor_R, found_R = _cut(given.largest(n_few), lse_R, n_largest, top_p, is_all=n_few == vocabulary)
    if not found_R.all():
        rest_R = (~found_R).nonzero().squeeze(1)
        all_RV = given.largest(vocabulary, rest_R)
        floor_R[rest_R] = _cut(all_RV, lse_R[rest_R], n_largest, top_p, is_all=True)[0]
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
