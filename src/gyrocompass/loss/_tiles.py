"""How [N, V] is cut into tiles of logits, and which tile holds the logits that are wanted one by one.

Tiles go over the vocabulary outside and over tokens inside: each row of w is read once, and each row of dw
can be finished before the next is begun. All tiles share one buffer, so a tile is gone when the next comes,
unless they are kept: then each part of the vocabulary has a buffer of its own, and the second pass finds the
logits where the first left them.

Shape legend: N counted tokens, D hidden width, V vocabulary, P picks; a tile is R tokens by K vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gyrocompass.loss._products import products_for
from gyrocompass.loss._question import Logits, Picks

TILE_TOKENS = 2048
"""R at most."""
TILE_ELEMENTS = 1 << 22
"""R * K and K * D at most: a tile of logits and a tile of w, each 16 MB in float32.

On a quiet machine tiles from 1 to 32 MB are equally fast, within the noise. Large ones are chosen because a
small operation that waits for a thread whose core is taken costs as much as a large one.
"""


class TileSize(NamedTuple):
    """What a tile is at most, as `TILE_TOKENS` and `TILE_ELEMENTS` say it."""

    tokens: int
    elements: int
    alike: bool = False
    """Whether a row's products must not depend on its place in the tile."""


class Tile(NamedTuple):
    """Logits of some tokens over a part of the vocabulary; -inf where the bias is."""

    z_RK: Tensor
    rows: slice
    columns: slice
    outside_K: Tensor | None
    """Which columns have a bias of -inf; None if none has."""
    picks: slice
    """The picks that fall in this tile."""

    def not_allowed(self, floor_N: Tensor | None) -> Tensor | None:
        """What is not allowed here, [K] or [R, K]; None if everything is. Reads z_RK, so ask it first."""
        if floor_N is None:
            return self.outside_K
        below_RK = self.z_RK < floor_N[self.rows, None]
        return below_RK if self.outside_K is None else below_RK.logical_or_(self.outside_K)


class TilePicks(NamedTuple):
    """The picks that are here, in the order of the tiles they fall in."""

    row_Q: Tensor
    token_Q: Tensor
    asked_Q: Tensor
    """Which pick of the question each is."""

    def within(self, tile: Tile) -> tuple[Tensor, Tensor]:
        """Where the tile's picks are in its z_RK."""
        return self.row_Q[tile.picks] - tile.rows.start, self.token_Q[tile.picks] - tile.columns.start


class Tiles:
    """The tiles of one question."""

    def __init__(
        self, logits: Logits, picks: Picks, *, keep: bool = False, size: TileSize | None = None
    ) -> None:
        n_rows, (vocabulary, width) = len(logits.h_ND), logits.w_VD.shape
        most_tokens, most_elements, alike = size or TileSize(TILE_TOKENS, TILE_ELEMENTS)
        self.logits, self.dtype, self.keep, self.n_picks = logits, logits.dtype, keep, len(picks.row_P)
        self.n_rows_tile = max(1, math.ceil(n_rows / max(1, math.ceil(n_rows / most_tokens))))
        self.n_columns_tile = min(vocabulary, max(1, most_elements // max(self.n_rows_tile, width)))
        self.rows = _cut(n_rows, self.n_rows_tile)
        self.columns = _cut(vocabulary, self.n_columns_tile)
        self.products = products_for(logits, (self.n_rows_tile, self.n_columns_tile), alike=alike)
        self._buffer = self._room(n_rows * vocabulary if keep else self.n_rows_tile * self.n_columns_tile)
        self._filled = 0
        self._outside_V = self._bias_V = None
        if logits.bias_V is not None:
            self._outside_V = logits.bias_V.isneginf()
            self._bias_V = logits.bias_V.to(self.dtype).masked_fill(self._outside_V, 0.0)
        self.picks, self._pick_ends = self._by_tile(picks)

    def spare(self) -> Tensor:
        """Room for one more tile."""
        return self._room(self.n_rows_tile * self.n_columns_tile)

    def __iter__(self) -> Iterator[Tile]:
        """All tiles in order; each is overwritten by the next, unless tiles are kept."""
        for columns in self.columns:
            yield from self.across(columns)

    def across(self, columns: slice) -> Iterator[Tile]:
        """The tiles of one part of the vocabulary."""
        self.products.enter(columns)
        outside_K = None if self._outside_V is None else self._outside_V[columns]
        if outside_K is not None and not outside_K.any():
            outside_K = None
        for index, rows in enumerate(self.rows, start=columns.start // self.n_columns_tile * len(self.rows)):
            picks = slice(self._pick_ends[index], self._pick_ends[index + 1])
            tile = Tile(self._place(rows, columns), rows, columns, outside_K, picks)
            if not self.keep or self._filled <= index:
                self._fill(tile)
                self._filled = index + 1
            yield tile

    def _room(self, elements: int) -> Tensor:
        return torch.empty(elements, dtype=self.dtype, device=self.logits.h_ND.device)

    def _place(self, rows: slice, columns: slice) -> Tensor:
        """Where the tile's logits are."""
        if not self.keep:
            return like_tile(self._buffer, rows, columns)
        n_rows, width = len(self.logits.h_ND), columns.stop - columns.start
        start = n_rows * columns.start + rows.start * width
        return like_tile(self._buffer[start:], rows, columns)

    def _fill(self, tile: Tile) -> None:
        """Compute the tile's logits."""
        softcap, logit_scale, temperature = self.logits.rule
        self.products.logits(tile.rows, tile.z_RK)
        if self._bias_V is not None:
            tile.z_RK.add_(self._bias_V[tile.columns])
        if softcap is not None:
            tile.z_RK.mul_(logit_scale / softcap).tanh_().mul_(softcap / temperature)
        elif logit_scale != temperature:
            tile.z_RK.mul_(logit_scale / temperature)
        if tile.outside_K is not None:
            tile.z_RK.masked_fill_(tile.outside_K, -torch.inf)

    def _by_tile(self, picks: Picks) -> tuple[TilePicks, list[int]]:
        """The picks that are here, sorted by tile, and where each tile's begin (and the last one's end)."""
        here_Q = (picks.token_P >= 0).nonzero().squeeze(1)
        row_Q, token_Q = picks.row_P[here_Q], picks.token_P[here_Q]
        tile_Q = token_Q // self.n_columns_tile * len(self.rows) + row_Q // self.n_rows_tile
        order_Q = tile_Q.argsort(stable=True)
        n_picks = torch.bincount(tile_Q, minlength=len(self.rows) * len(self.columns))
        sorted_picks = TilePicks(row_Q[order_Q], token_Q[order_Q], here_Q[order_Q])
        return sorted_picks, [0, *n_picks.cumsum(0).tolist()]


def like_tile(buffer: Tensor, rows: slice, columns: slice) -> Tensor:
    """The beginning of a buffer, in the shape of a tile."""
    shape = (rows.stop - rows.start, columns.stop - columns.start)
    return buffer[: shape[0] * shape[1]].view(shape)


def _cut(total: int, part: int) -> list[slice]:
    """0 ... total in parts of a size; the last may be smaller."""
    return [slice(start, min(start + part, total)) for start in range(0, total, part)]
