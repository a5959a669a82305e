"""Invariant mode: a row's numbers are the same bits whatever rows it is computed beside.

Rows are computed in blocks of a fixed number, the last one filled up with zeros, and tiles of a fixed size,
so that every product has the same shape in every call and a row's sums are always taken in the same order.
Log-probabilities, statistics, draws, supports and dh are then the same bits however rows are batched, padded,
ordered or packed, with one backend, dtype and number of threads. dw, dbias and db are sums over rows, all at
once: they have the bits of their set of rows.

This asks of a product that a row's bits do not depend on where in the block it stands. No BLAS promises that:
the chunked backend's float32 and float64 products are tried out before their first use, and mended where they
fail (`_alike.py`). It also asks of an operation on single numbers, and of a sum along a row, that they do not
depend on their neighbours; to that the tests hold the CPU's kernels.

It costs one more pass over the logits in the gradient (dh by block, dw over all rows), and blocks too small
for the best speed of products: forward and backward of the chunked backend took 1.5 to 1.8 times (float32)
and 2.3 times (bf16) as long, with 2048 rows, a width of 576 and 16384 tokens on one CPU core. The trials of
a process's first call took 0.1 to 0.7 s (width 256, 8192 tokens); after it they cost nothing. Where rows had
to be copied, float64 with an odd width on an AMD processor, it took up to 1.1 times as long.

Shape legend: N counted tokens, V vocabulary, P picks; a block is R rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gyrocompass.loss._chunked import ChunkedBackend, asks_of, joined, part_of, row_blocks
from gyrocompass.loss._question import Asks, Backend, Gradients, Logits, Needs, Picks, Slopes, SlopesOf, Sums
from gyrocompass.loss._support import Ranks, block_floor, no_picks
from gyrocompass.loss._tiles import TileSize

BLOCK_ROWS = 128
"""More are faster for many rows (256: by about 10%), and slower for a few, which are filled up to so many."""
TILE = TileSize(BLOCK_ROWS, 1 << 22, alike=True)
TILE_OVER_ALL = TILE._replace(alike=False)
"""Of sums over all rows, whose numbers differ from call to call: each would be a trial of its own."""


class Invariant:
    """A backend, called with blocks of one size."""

    def __init__(self, backend: Backend) -> None:
        is_chunked = isinstance(backend, ChunkedBackend)
        self.backend = ChunkedBackend(TILE) if is_chunked else backend
        self.over_all = ChunkedBackend(TILE_OVER_ALL) if is_chunked else backend
        self.name = backend.name

    def refusal(self, logits: Logits) -> str | None:
        """As the backend's."""
        return self.backend.refusal(logits)

    def sums(self, logits: Logits, picks: Picks, asks: Asks) -> Sums:
        """The sums of each block, side by side."""
        found = []
        for rows, own in _blocks(logits, picks):
            asked = asks_of(asks, rows)
            asked = asked._replace(threshold_N=_filled(asked.threshold_N), seed_N=_filled(asked.seed_N))
            sums = self.backend.sums(_block(logits, rows), _picks_of(picks, rows, own), asked)
            found.append(_first_sums(sums, rows.stop - rows.start))
        return joined(found, lambda: self.backend.sums(logits, picks, asks))

    def gradients(self, logits: Logits, picks: Picks, slopes: Slopes, needs: Needs) -> Gradients:
        """dh and da by block; the gradients of what all rows share over all rows at once."""
        shared = self.over_all.gradients(logits, picks, slopes, needs._replace(h=False))
        if not needs.h and not needs.low_rank:
            return shared
        by_row = Needs(h=needs.h, w=False, bias=False, low_rank=needs.low_rank)
        parts = []
        for rows, own in _blocks(logits, picks):
            block, block_picks = _block(logits, rows), _picks_of(picks, rows, own)
            found = self.backend.gradients(block, block_picks, _slopes_of(slopes, rows, own), by_row)
            n_rows = rows.stop - rows.start
            parts.append((_first(found.dh_ND, n_rows), _first(found.da_NR, n_rows)))
        if not parts:
            return self.backend.gradients(logits, picks, slopes, needs)
        dh_ND, da_NR = (_stacked(side) for side in zip(*parts, strict=True))
        return shared._replace(dh_ND=dh_ND, da_NR=da_NR)

    def fused(
        self, logits: Logits, picks: Picks, asks: Asks, slopes_of: SlopesOf, needs: Needs
    ) -> tuple[Sums, Gradients]:
        """Never asked for: `prefers_fused` says no."""
        raise NotImplementedError

    def prefers_fused(self, logits: Logits, needs: Needs) -> bool:
        """No: the blocks of `fused` are not of one size."""
        return False


def invariant_floor(logits: Logits, top_k: int, top_p: float, ranks: Ranks | None = None) -> Tensor:
    """`support_floor`, by the same blocks."""
    floors = [logits.h_ND.new_empty(0, dtype=logits.dtype)]
    for rows, _ in _blocks(logits, no_picks(logits)):
        floor_N = block_floor(_block(logits, rows), top_k, top_p, ranks, TILE)
        floors.append(floor_N[: rows.stop - rows.start])
    return torch.cat(floors)


def _blocks(logits: Logits, picks: Picks) -> Iterator[tuple[slice, slice]]:
    return row_blocks(logits, picks, BLOCK_ROWS * len(logits.w_VD))


def _block(logits: Logits, rows: slice) -> Logits:
    """The rows' part of the question, filled up with rows of zeros."""
    part = part_of(logits, rows)
    return part._replace(h_ND=_filled(part.h_ND), a_NR=_filled(part.a_NR), floor_N=_filled(part.floor_N))  # type: ignore[arg-type]


def _picks_of(picks: Picks, rows: slice, own: slice) -> Picks:
    return Picks(picks.row_P[own] - rows.start, picks.token_P[own])


def _slopes_of(slopes: Slopes, rows: slice, own: slice) -> Slopes:
    """The rows' slopes, filled up."""
    top_N, a_N, b_N, c_N, d_N = (_filled(None if part is None else part[rows]) for part in slopes[:-1])
    assert top_N is not None and a_N is not None
    return Slopes(top_N, a_N, b_N, c_N, d_N, slopes.pick_P[own])


def _filled(part: Tensor | None) -> Tensor | None:
    """Zeros after the rows, up to the size of a block."""
    if part is None:
        return None
    return torch.cat([part, part.new_zeros(BLOCK_ROWS - len(part), *part.shape[1:])])


def _first(part: Tensor | None, n_rows: int) -> Tensor | None:
    """Without the rows that fill up."""
    return None if part is None else part[:n_rows]


def _first_sums(sums: Sums, n_rows: int) -> Sums:
    """The same of all sums but the picks, which are those of the rows alone."""
    return Sums(*(_first(part, n_rows) for part in sums))._replace(pick_P=sums.pick_P)  # type: ignore[arg-type]


def _stacked(parts: Sequence[Tensor | None]) -> Tensor | None:
    """The blocks' rows, one after the other."""
    given = [part for part in parts if part is not None]
    return torch.cat(given) if given else None
