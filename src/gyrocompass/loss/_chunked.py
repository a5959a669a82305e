"""The tiled backend in plain torch, on any device: the readable way never to hold [N, V].

Forward: each tile of logits is computed, reduced to a few running sums per token (relative to a running
maximum, so nothing overflows), and forgotten. Backward: it is computed once more, turned into its gradient in
place, and multiplied into dh and dw. `fused` keeps the tiles of some rows until their slopes are known, and
so computes them once. dw is summed in the arithmetic dtype over all tokens and rounded once, as dh is.

The count above a threshold compares tile logits with a number computed elsewhere: a logit that equals it up
to rounding may be counted either way.

Shape legend: N counted tokens, D hidden width, V vocabulary, P picks, K of a top list; a tile is R tokens by
K vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from gyrocompass.loss._noise import gumbel
from gyrocompass.loss._question import Asks, Gradients, Logits, Needs, Picks, Slopes, SlopesOf, Sums
from gyrocompass.loss._tiles import Tile, Tiles, TileSize, like_tile

KEPT_ELEMENTS = 1 << 24
"""Logits that `fused` keeps at a time: 64 MB in float32."""


class ChunkedBackend:
    """Sums and gradients by tiles."""

    name = "chunked"

    def __init__(self, size: TileSize | None = None) -> None:
        self.size = size

    def refusal(self, logits: Logits) -> str | None:
        """Nothing is refused."""
        return None

    def sums(self, logits: Logits, picks: Picks, asks: Asks) -> Sums:
        """One pass over the tiles."""
        return _sums(Tiles(logits, picks, size=self.size), asks)

    def gradients(self, logits: Logits, picks: Picks, slopes: Slopes, needs: Needs) -> Gradients:
        """The pass back, each part of the vocabulary finished before the next."""
        totals = _Totals(logits, needs, in_parts=True)
        totals.add(Tiles(logits, picks, size=self.size), slopes)
        return totals.rounded()

    def fused(
        self, logits: Logits, picks: Picks, asks: Asks, slopes_of: SlopesOf, needs: Needs
    ) -> tuple[Sums, Gradients]:
        """Blocks of rows whose tiles are kept between the two passes."""
        totals = _Totals(logits, needs, in_parts=False)
        found = []
        for rows, own in row_blocks(logits, picks, KEPT_ELEMENTS):
            block = part_of(logits, rows)
            block_picks = Picks(picks.row_P[own] - rows.start, picks.token_P[own])
            tiles = Tiles(block, block_picks, keep=True, size=self.size)
            sums = _sums(tiles, asks_of(asks, rows))
            found.append(sums)
            totals.add(tiles, slopes_of(rows, sums, own), first_row=rows.start)
        return joined(found, lambda: self.sums(logits, picks, asks)), totals.rounded()

    def prefers_fused(self, logits: Logits, needs: Needs) -> bool:
        """Where dw needs no sum of its own, and a block has rows enough for efficient products."""
        summed_in_place = not needs.w or logits.w_VD.dtype == logits.dtype
        return summed_in_place and KEPT_ELEMENTS // len(logits.w_VD) >= min(256, len(logits.h_ND))


def row_blocks(logits: Logits, picks: Picks, elements: int) -> Iterator[tuple[slice, slice]]:
    """Rows with at most so many logits together (one row at least), and the picks of each block."""
    n_rows, vocabulary = len(logits.h_ND), len(logits.w_VD)
    n_block = max(1, elements // vocabulary)
    starts = list(range(0, n_rows, n_block))
    ends = torch.searchsorted(
        picks.row_P, torch.tensor([*starts, n_rows], device=picks.row_P.device)
    ).tolist()
    for index, start in enumerate(starts):
        yield slice(start, min(start + n_block, n_rows)), slice(ends[index], ends[index + 1])


def part_of(logits: Logits, rows: slice) -> Logits:
    """The same question for some of its rows."""
    return logits._replace(
        h_ND=logits.h_ND[rows],
        a_NR=None if logits.a_NR is None else logits.a_NR[rows],
        floor_N=None if logits.floor_N is None else logits.floor_N[rows],
    )


def asks_of(asks: Asks, rows: slice) -> Asks:
    """The same asks for some of the rows."""
    return asks._replace(
        threshold_N=None if asks.threshold_N is None else asks.threshold_N[rows],
        seed_N=None if asks.seed_N is None else asks.seed_N[rows],
    )


def joined(blocks: list[Sums], of_nothing: Callable[[], Sums]) -> Sums:
    """The sums of blocks of rows, one after the other; without any block, the sums of no rows."""
    if not blocks:
        return of_nothing()
    return Sums(*(None if parts[0] is None else torch.cat(parts) for parts in zip(*blocks, strict=True)))  # type: ignore[arg-type]


def _sums(tiles: Tiles, asks: Asks) -> Sums:
    running = _Running(tiles, asks)
    for tile in tiles:
        running.add(tile)
    return running.sums()


class _Running:
    """Sums over the tiles seen so far, per token, relative to the largest logit seen so far."""

    def __init__(self, tiles: Tiles, asks: Asks) -> None:
        logits = tiles.logits
        n_rows = len(logits.h_ND)
        self.tiles, self.asks = tiles, asks
        zero_N = torch.zeros(n_rows, dtype=tiles.dtype, device=logits.h_ND.device)
        self.top_N = torch.full_like(zero_N, torch.finfo(tiles.dtype).min)
        self.exp_N = zero_N.clone()
        self.exp_x_N = zero_N.clone() if asks.entropy else None
        self.exp_sq_N = zero_N.clone() if asks.sum_sq else None
        self.z_N = zero_N.clone() if asks.mean_logit else None
        self.count_N = zero_N.clone() if asks.mean_logit else None
        self.above_N = zero_N.long() if asks.threshold_N is not None else None
        self.top_NK = zero_N.new_full((n_rows, asks.top), -torch.inf) if asks.top else None
        self.top_token_NK = zero_N.new_zeros((n_rows, asks.top), dtype=torch.int64) if asks.top else None
        self.drawn_N = zero_N.long() if asks.seed_N is not None else None
        self.key_N = torch.full_like(zero_N, -torch.inf) if asks.seed_N is not None else None
        self.pick_Q = zero_N.new_empty(len(tiles.picks.row_Q))
        self.spare = tiles.spare()

    def add(self, tile: Tile) -> None:
        """Take a tile into the sums; its buffer is spent, unless tiles are kept."""
        z_RK, rows, floor_N = tile.z_RK, tile.rows, self.tiles.logits.floor_N
        self.pick_Q[tile.picks] = z_RK[self.tiles.picks.within(tile)]
        banned = tile.not_allowed(floor_N)
        if floor_N is not None and banned is not None:
            z_RK = (z_RK.clone() if self.tiles.keep else z_RK).masked_fill_(banned, -torch.inf)
        if self.z_N is not None and self.count_N is not None:
            self.z_N[rows] += z_RK.sum(dim=1) if banned is None else z_RK.masked_fill(banned, 0.0).sum(dim=1)
            self.count_N[rows] += z_RK.shape[1] if banned is None else banned.logical_not().sum(dim=-1)
        self._choose(tile, z_RK)
        top_R = torch.maximum(self.top_N[rows], z_RK.amax(dim=1))
        self._lower(rows, top_R)
        x_RK = z_RK - top_R[:, None] if self.tiles.keep else z_RK.sub_(top_R[:, None])
        exp_RK = torch.exp(x_RK, out=like_tile(self.spare, rows, tile.columns))
        if self.exp_x_N is not None:
            if banned is not None:
                x_RK.masked_fill_(banned, 0.0)
            self.exp_x_N[rows] += x_RK.mul_(exp_RK).sum(dim=1)
        self.exp_N[rows] += exp_RK.sum(dim=1)
        if self.exp_sq_N is not None:
            self.exp_sq_N[rows] += exp_RK.square_().sum(dim=1)

    def _choose(self, tile: Tile, z_RK: Tensor) -> None:
        """Count what is above the threshold, and keep the largest logits and keys."""
        rows, asks, start = tile.rows, self.asks, tile.columns.start
        if self.above_N is not None and asks.threshold_N is not None:
            above_RK = like_tile(self.spare, rows, tile.columns)
            self.above_N[rows] += torch.gt(z_RK, asks.threshold_N[rows, None], out=above_RK).sum(dim=1).long()
        if self.top_NK is not None and self.top_token_NK is not None:
            best = torch.topk(z_RK, min(asks.top, z_RK.shape[1]), dim=1)
            z_RJ = torch.cat([self.top_NK[rows], best.values], dim=1)
            token_RJ = torch.cat([self.top_token_NK[rows], best.indices + start], dim=1)
            self.top_NK[rows], place_RK = torch.topk(z_RJ, asks.top, dim=1)
            self.top_token_NK[rows] = token_RJ.gather(1, place_RK)
        if self.key_N is not None and self.drawn_N is not None and asks.seed_N is not None:
            token_K = torch.arange(start, tile.columns.stop, device=z_RK.device) + asks.first_token
            key_RK = gumbel(asks.seed_N[rows], token_K, z_RK.dtype).add_(z_RK)
            key_R, token_R = key_RK.max(dim=1)
            better_R = key_R > self.key_N[rows]
            self.key_N[rows] = torch.where(better_R, key_R, self.key_N[rows])
            self.drawn_N[rows] = torch.where(better_R, token_R + start, self.drawn_N[rows])

    def _lower(self, rows: slice, top_R: Tensor) -> None:
        """Make the sums relative to a new, not smaller, largest logit."""
        change_R = self.top_N[rows] - top_R
        factor_R = change_R.exp()
        if self.exp_x_N is not None:
            self.exp_x_N[rows] = factor_R * (self.exp_x_N[rows] + change_R * self.exp_N[rows])
        if self.exp_sq_N is not None:
            self.exp_sq_N[rows] *= factor_R.square()
        self.exp_N[rows] *= factor_R
        self.top_N[rows] = top_R

    def sums(self) -> Sums:
        """What the sums are, once every tile was added."""
        picks = self.tiles.picks
        pick_P = self.exp_N.new_zeros(self.tiles.n_picks).index_copy_(0, picks.asked_Q, self.pick_Q)
        return Sums(
            top_N=self.top_N,
            exp_N=self.exp_N,
            pick_P=pick_P,
            exp_x_N=self.exp_x_N,
            exp_sq_N=self.exp_sq_N,
            z_N=self.z_N,
            count_N=self.count_N,
            above_N=self.above_N,
            top_NK=self.top_NK,
            top_token_NK=self.top_token_NK,
            drawn_N=self.drawn_N,
            drawn_key_N=self.key_N,
        )


class _Totals:
    """Gradients in the arithmetic dtype, while tiles are added; w's side is [w b], as `_products.py` has it.

    In parts, each part of the vocabulary comes once, with all rows: it is rounded into its place as soon as
    it is finished. Otherwise parts come again, with other rows, and the sums of the whole are kept.
    """

    def __init__(self, logits: Logits, needs: Needs, *, in_parts: bool) -> None:
        self.logits, dtype = logits, logits.dtype
        width = logits.w_VD.shape[1]
        low_rank = needs.low_rank and logits.a_NR is not None
        end = width + (logits.a_NR.shape[1] if low_rank and logits.a_NR is not None else 0)
        self.left, self.right = slice(0 if needs.h else width, end), slice(0 if needs.w else width, end)
        """Which columns of [h a] and of [w b] have a gradient that is wanted."""
        self.needs = needs._replace(low_rank=low_rank, bias=needs.bias and logits.bias_V is not None)
        n_rows, vocabulary = len(logits.h_ND), len(logits.w_VD)
        new_zeros = logits.h_ND.new_zeros
        self.dh_NW = new_zeros(n_rows, end - self.left.start, dtype=dtype)
        self.dbias_V = new_zeros(vocabulary, dtype=dtype) if self.needs.bias else None
        self.dw_VD = torch.zeros_like(logits.w_VD) if needs.w and in_parts else None
        self.db_VR = (
            torch.zeros_like(logits.b_VR) if low_rank and in_parts and logits.b_VR is not None else None
        )
        self.sum_VW = None if in_parts else new_zeros(vocabulary, end - self.right.start, dtype=dtype)
        if in_parts and not low_rank and logits.w_VD.dtype == dtype:
            self.sum_VW = self.dw_VD

    def add(self, tiles: Tiles, slopes: Slopes, first_row: int = 0) -> None:
        """Add what some rows contribute."""
        softcap = tiles.logits.rule.softcap
        spare = slopes.top_N if softcap is None else tiles.spare()
        for columns in tiles.columns:
            sum_KW = self._part(columns)
            for tile in tiles.across(columns):
                dz_RK = _to_gradient(tiles, tile, slopes, spare)
                rows = slice(tile.rows.start + first_row, tile.rows.stop + first_row)
                if self.left.stop > self.left.start:
                    tiles.products.add_dh(dz_RK, self.left, self.dh_NW[rows])
                if self.right.stop > self.right.start:
                    tiles.products.add_dw(dz_RK, tile.rows, self.right, sum_KW)
                if self.dbias_V is not None:
                    self.dbias_V[columns] += dz_RK.sum(dim=0)
            self._finish(columns, sum_KW)

    def _part(self, columns: slice) -> Tensor:
        """Where a part of the vocabulary is summed."""
        if self.sum_VW is not None:
            return self.sum_VW[columns]
        return self.dh_NW.new_zeros(columns.stop - columns.start, self.right.stop - self.right.start)

    def _finish(self, columns: slice, sum_KW: Tensor) -> None:
        """Round a finished part into its place."""
        if self.sum_VW is not None:
            return
        if self.dw_VD is not None:
            self.dw_VD[columns] = sum_KW[:, : self.dw_VD.shape[1]]
        if self.db_VR is not None:
            self.db_VR[columns] = _last(sum_KW, self.db_VR)

    def rounded(self) -> Gradients:
        """The gradients, in the dtypes of their inputs."""
        h_ND, w_VD, bias_V, a_NR, b_VR = self.logits[:5]
        width, needs = w_VD.shape[1], self.needs
        dw_VD, db_VR = self.dw_VD, self.db_VR
        if dw_VD is None and needs.w and self.sum_VW is not None:
            dw_VD = self.sum_VW[:, :width].to(w_VD.dtype)
        if db_VR is None and b_VR is not None and needs.low_rank and self.sum_VW is not None:
            db_VR = _last(self.sum_VW, b_VR).to(b_VR.dtype)
        return Gradients(
            dh_ND=self.dh_NW[:, :width].to(h_ND.dtype) if needs.h else None,
            dw_VD=dw_VD,
            dbias_V=None if self.dbias_V is None or bias_V is None else self.dbias_V.to(bias_V.dtype),
            da_NR=_last(self.dh_NW, a_NR).to(a_NR.dtype) if needs.low_rank and a_NR is not None else None,
            db_VR=db_VR,
        )


def _last(columns: Tensor, like: Tensor) -> Tensor:
    """The last columns, as many as another tensor has (perhaps none)."""
    return columns[:, columns.shape[1] - like.shape[1] :]


def _to_gradient(tiles: Tiles, tile: Tile, slopes: Slopes, spare: Tensor) -> Tensor:
    """Turn a tile of logits into the gradient of h w^T + bias, in its place."""
    top_N, a_N, b_N, c_N, d_N, pick_P = slopes
    z_RK, rows = tile.z_RK, tile.rows
    banned = tile.not_allowed(tiles.logits.floor_N)
    softcap, _, temperature = tiles.logits.rule
    bend_RK = None
    if softcap is not None:
        bend_RK = torch.mul(z_RK, temperature / softcap, out=like_tile(spare, rows, tile.columns))
        bend_RK.square_().neg_().add_(1.0)
    x_RK = z_RK.sub_(top_N[rows, None])
    if b_N is None and c_N is None:
        dz_RK = x_RK.exp_().mul_(a_N[rows, None])
    else:
        if banned is not None:
            x_RK.masked_fill_(banned, 0.0)
        exp_RK = x_RK.exp()
        inner_RK = x_RK.mul_(0.0 if b_N is None else b_N[rows, None]).add_(a_N[rows, None])
        if c_N is not None:
            inner_RK.addcmul_(exp_RK, c_N[rows, None])
        dz_RK = inner_RK.mul_(exp_RK)
    if d_N is not None:
        dz_RK.add_(d_N[rows, None])
    picked_Q = pick_P[tiles.picks.asked_Q[tile.picks]]
    dz_RK.index_put_(tiles.picks.within(tile), picked_Q, accumulate=True)
    if bend_RK is not None:
        dz_RK.mul_(bend_RK)
    return dz_RK if banned is None else dz_RK.masked_fill_(banned, 0.0)
