"""The backend for GPUs, on Triton kernels (`_triton_kernels.py`) and the vendor's matrix products.

`sums` makes each tile of logits in registers, folds it into its rows' sums and forgets it: the head is read,
a few numbers per row are written.

`gradients` makes the logits once more and writes dz, in bf16 for bf16 inputs, for a bounded part of the
vocabulary; two products with float32 sums turn it into that part's dw, rounded once, and its share of dh.

`fused` keeps the logits of a block of rows, and so makes them once: for bf16 in 16 bits, as depths below the
largest of a few that lie together, because dz will have no more; dz takes their place. dw then comes in as
many shares as there are blocks, and [V, D] of float32 to add them up would be the largest thing in memory:
bf16 is rounded after each block, and blocks are so large that there are few.

Nothing is added atomically: the same call gives the same bits. Products of float32 inputs inside kernels are
float32; those by the vendor's library follow the process's setting (`torch.backends.cuda.matmul`, full
float32 by default). float16 gradients are multiplied as float32, because small probabilities times small
weights underflow in float16.

Left out: float64 and hidden states and head of different dtypes (the chunked backend has them), and anything
that depends on which GPU it is, but for the tiles' sizes, which are tried on the first call.

Shape legend: N counted tokens, D hidden width, V vocabulary, L rank of a low-rank addition, R rows of a
block, K tokens of a part of the vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gyrocompass.loss._chunked import asks_of, joined, part_of, row_blocks
from gyrocompass.loss._question import Asks, Gradients, Logits, Needs, Picks, Slopes, SlopesOf, Sums
from gyrocompass.loss._triton_launch import (
    Ready,
    Tiles,
    keeps_16_bits,
    kept_in,
    launch_dz,
    launch_dz_in_place,
    launch_sums,
    ready,
    room_to_keep,
)

ROWS = 1 << 15
"""Rows at a time, at most, where no logits are kept: their parts' sums take some 3 KB each."""
DZ_ELEMENTS = 1 << 26
"""Of dz at a time: 128 MB in bf16, beside twice as much of logits."""
COLUMNS = 16384
"""Of dz at a time, at most: a part of dw in float32 has as many rows."""
KEPT_BYTES = 900 << 20
"""Logits that `fused` keeps at a time, and the 16 or 32 bits of dz in their place."""
MOST_BLOCKS = 3
"""`fused` rounds bf16 dw after each block: 3 times are an error of 2.4e-3 of its norm, one time 1.6e-3."""
ROWS_OF_TILE = 256
TILE_ELEMENTS = 1 << 24
"""Logits that are made at a time for sums: 64 MB in float32."""
WIDE = 1024
"""From this hidden width on, the library makes logits."""
FEW = 8
"""Slots of a top list, up to which parts of the vocabulary are small enough for tiles."""
ALIGNED = 256
"""Parts of the vocabulary start at multiples of it, so that kernels load whole cache lines."""


class TritonBackend:
    """Sums and gradients by Triton kernels."""

    name = "triton"

    def refusal(self, logits: Logits) -> str | None:
        """Why not: no triton, no GPU, or dtypes that have no kernel."""
        on_gpu = logits.h_ND.is_cuda
        # The first question of all: importing triton takes a second.
        if not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
            return f"the hidden states are on {logits.h_ND.device}, not on a GPU"
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if on_gpu and torch.cuda.get_device_capability(logits.h_ND.device) < (8, 0):
            return "the GPU is older than compute capability 8.0"
        for left, right in ((logits.h_ND, logits.w_VD), (logits.a_NR, logits.b_VR)):
            if left is not None and right is not None and left.dtype != right.dtype:
                return f"it has no product of {left.dtype} and {right.dtype}"
        return "float64 is not supported" if logits.dtype == torch.float64 else None

    def sums(self, logits: Logits, picks: Picks, asks: Asks) -> Sums:
        """One pass over the logits, made in registers."""
        with _on_device(logits.h_ND):
            found = []
            for rows, own in _row_blocks(logits, picks, ROWS):
                block = _block(logits, picks, rows, own)
                tiles = _tiles_of(block.logits) if asks.top <= FEW and _by_library(logits) else None
                found.append(launch_sums(block, asks_of(asks, rows), tiles))
            return joined(found, lambda: launch_sums(ready(logits, picks), asks, None))

    def gradients(self, logits: Logits, picks: Picks, slopes: Slopes, needs: Needs) -> Gradients:
        """The pass back, each part of the vocabulary finished before the next."""
        with _on_device(logits.h_ND):
            found = _Found(logits, needs)
            blocks = [
                (_block(logits, picks, rows, own), _slopes_of_block(slopes, rows, own), found.row_sums(rows))
                for rows, own in _row_blocks(logits, picks, ROWS)
            ]
            for columns in _parts(len(logits.w_VD), min(ROWS, len(logits.h_ND))):
                dw_KD = found.new_dw(columns, len(blocks))
                for block, block_slopes, row_sums in blocks:
                    y_RK = _made(block.logits, columns) if _by_library(logits) else None
                    dz_RK = launch_dz(block, block_slopes, columns, y_RK)
                    del y_RK
                    row_sums.add(dz_RK, columns)
                    found.add(dz_RK, block.logits, columns)
                    if dw_KD is not None:
                        add_product(dw_KD, dz_RK.T, block.logits.h_ND)
                    elif found.dw_VD is not None:
                        put_product(found.dw_VD[columns], dz_RK.T, block.logits.h_ND)
                found.put_dw(columns, dw_KD)
            for _, _, row_sums in blocks:
                row_sums.finish()
            return found.rounded()

    def fused(
        self, logits: Logits, picks: Picks, asks: Asks, slopes_of: SlopesOf, needs: Needs
    ) -> tuple[Sums, Gradients]:
        """Blocks of rows whose logits are kept between the two passes."""
        with _on_device(logits.h_ND):
            found, sums = _Found(logits, needs), []
            blocks = list(_row_blocks(logits, picks, _rows_kept(logits)))
            vocabulary = len(logits.w_VD)
            whole, is_rounded = slice(0, vocabulary), logits.w_VD.dtype == torch.bfloat16
            sum_VD = None if is_rounded else found.new_dw(whole, len(blocks))
            dw_VD = found.dw_VD if sum_VD is None else sum_VD
            room = room_to_keep(logits, blocks[0][0].stop if blocks else 0)
            for rows, own in blocks:
                block, row_sums = _block(logits, picks, rows, own), found.row_sums(rows)
                kept = kept_in(room, rows.stop - rows.start, vocabulary)
                tiles = _tiles_of(block.logits)
                if kept.crest_CN is None:
                    tiles = _one_tile(_made(block.logits, whole, kept.z_NV.view(-1)))
                sums.append(launch_sums(block, asks_of(asks, rows), tiles, kept))
                dz_RV = launch_dz_in_place(block, slopes_of(rows, sums[-1], own), kept)
                for columns in _parts_of_products(dz_RV, logits):
                    dz_RK = dz_RV[:, columns]
                    row_sums.add(dz_RK, columns)
                    found.add(dz_RK, block.logits, columns)
                    if dw_VD is not None:
                        put_or_add = put_product if rows.start == 0 else add_product
                        put_or_add(dw_VD[columns], dz_RK.T, block.logits.h_ND)
                row_sums.finish()
            found.put_dw(whole, sum_VD)
            return joined(sums, lambda: self.sums(logits, picks, asks)), found.rounded()

    def prefers_fused(self, logits: Logits, needs: Needs) -> bool:
        """Where a product saved costs more than writing and reading its logits, and dw is added to seldom.

        An estimate from published bandwidths and rates, not a measurement: 2 D operations of a product at
        600 Tflop/s against some 8 bytes at 3 TB/s; and one addition to dw moves as many bytes as a product
        over some 500 rows takes time. Rounded sums of too many blocks would be too far off.
        """
        n_rows, n_kept = len(logits.h_ND), _rows_kept(logits)
        is_rounded = logits.h_ND.dtype == torch.bfloat16
        if logits.w_VD.shape[1] < WIDE or (is_rounded and not keeps_16_bits(logits)):
            return False
        in_few_blocks = not is_rounded or n_rows <= MOST_BLOCKS * n_kept
        return not needs.w or (n_kept >= min(512, n_rows) and in_few_blocks)


def _on_device(h_ND: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Kernels are launched on the current GPU: make it the tensors' own."""
    return torch.cuda.device(h_ND.device) if h_ND.is_cuda else contextlib.nullcontext()


def _row_blocks(logits: Logits, picks: Picks, n_block: int) -> list[tuple[slice, slice]]:
    """Rows in blocks, and the picks of each; a single block does not wait for the GPU to count them."""
    if 0 < len(logits.h_ND) <= n_block:
        return [(slice(0, len(logits.h_ND)), slice(0, len(picks.row_P)))]
    return list(row_blocks(logits, picks, n_block * len(logits.w_VD)))


def _rows_kept(logits: Logits) -> int:
    """Rows whose logits are kept at a time: whole tiles of a product's, if there are as many."""
    n_rows = max(1, KEPT_BYTES // (len(logits.w_VD) * (2 if keeps_16_bits(logits) else 4)))
    return n_rows // ROWS_OF_TILE * ROWS_OF_TILE or n_rows


def _block(logits: Logits, picks: Picks, rows: slice, own: slice) -> Ready:
    """The question for a block of rows, which are counted from its first."""
    return ready(part_of(logits, rows), Picks(picks.row_P[own] - rows.start, picks.token_P[own]))


def _slopes_of_block(slopes: Slopes, rows: slice, own: slice) -> Slopes:
    top_N, a_N, b_N, c_N, d_N, pick_P = slopes
    b_R, c_R, d_R = (None if slope_N is None else slope_N[rows] for slope_N in (b_N, c_N, d_N))
    return Slopes(top_N[rows], a_N[rows], b_R, c_R, d_R, pick_P[own])


def _parts(vocabulary: int, n_rows: int) -> list[slice]:
    """The vocabulary in parts, so that dz of so many rows is bounded."""
    n_columns = max(1, min(COLUMNS, DZ_ELEMENTS // max(1, n_rows)) // ALIGNED) * ALIGNED
    return [slice(at, min(at + n_columns, vocabulary)) for at in range(0, vocabulary, n_columns)]


def _parts_of_products(dz_RV: Tensor, logits: Logits) -> list[slice]:
    """All at once, but where factors of other dtypes than dz have to be copied."""
    vocabulary = len(logits.w_VD)
    return [slice(0, vocabulary)] if dz_RV.dtype == logits.w_VD.dtype else _parts(vocabulary, len(dz_RV))


def _by_library(logits: Logits) -> bool:
    """Whether products by the vendor's library, written and read, take less time than those in a kernel."""
    return logits.h_ND.is_cuda and logits.h_ND.dtype.itemsize == 2 and logits.w_VD.shape[1] >= WIDE


def _tiles_of(block: Logits) -> Tiles:
    """A block's logits, so many columns at a time, each in the room of the one before."""

    def tiles(multiple: int) -> Iterator[tuple[slice, Tensor]]:
        n_rows, vocabulary = len(block.h_ND), len(block.w_VD)
        n_columns = max(1, TILE_ELEMENTS // max(1, n_rows) // multiple) * multiple
        room = block.h_ND.new_empty(n_rows * min(n_columns, vocabulary), dtype=torch.float32)
        for start in range(0, vocabulary, n_columns):
            columns = slice(start, min(start + n_columns, vocabulary))
            yield columns, _made(block, columns, room)

    return tiles


def _one_tile(y_RV: Tensor) -> Tiles:
    """Logits of the whole vocabulary."""
    return lambda _: iter([(slice(0, y_RV.shape[1]), y_RV)])


def _made(block: Logits, columns: slice, room: Tensor | None = None) -> Tensor:
    """h w^T + a b^T of a block of rows and some columns, in float32."""
    h_RD, w_VD, _, a_RL, b_VL = block[:5]
    n_rows, n_columns = len(h_RD), columns.stop - columns.start
    if room is None:
        room = h_RD.new_empty(n_rows * n_columns, dtype=torch.float32)
    y_RK = room[: n_rows * n_columns].view(n_rows, n_columns)
    put_product(y_RK, h_RD, w_VD[columns].T)
    if a_RL is not None and b_VL is not None:
        add_product(y_RK, a_RL, b_VL[columns].T)
    return y_RK


def put_product(answer: Tensor, left: Tensor, right: Tensor) -> None:
    """answer = left @ right, summed in float32 and rounded once."""
    of_16_bits = answer.is_cuda and left.dtype == right.dtype != torch.float32
    if of_16_bits and answer.dtype == torch.float32:
        torch.mm(left, right, out_dtype=torch.float32, out=answer)
    elif of_16_bits and answer.dtype == left.dtype:
        with _shares_added_in_float32():
            torch.mm(left, right, out=answer)
    elif answer.dtype == torch.float32:
        torch.mm(left.float(), right.float(), out=answer)
    else:
        answer.copy_(left.float() @ right.float())


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, rounded once; a float32 total of 16-bit factors too."""
    if not total.is_cuda or left.dtype != right.dtype or left.dtype == torch.float32:
        total.copy_(torch.addmm(total.float(), left.float(), right.float()))
    elif total.dtype == left.dtype:
        with _shares_added_in_float32():
            total.addmm_(left, right)
    elif _adds_16_bit_products(total.device):
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total += torch.mm(left, right, out_dtype=torch.float32)


@functools.cache
def _adds_16_bit_products(device: torch.device) -> bool:
    """Whether this torch adds products of 16-bit factors to a float32 total."""
    total, factor = torch.ones(16, 16, device=device), torch.eye(16, dtype=torch.bfloat16, device=device)
    try:
        torch.addmm(total, factor, factor, out_dtype=torch.float32, out=total)
    except RuntimeError:
        return False
    return bool(total.sum() == 16 * 17)


@contextlib.contextmanager
def _shares_added_in_float32() -> Iterator[None]:
    """Where the library cuts a sum into shares, it may otherwise add these in 16 bits."""
    settings = torch.backends.cuda.matmul
    before = settings.allow_bf16_reduced_precision_reduction, settings.allow_fp16_reduced_precision_reduction
    settings.allow_bf16_reduced_precision_reduction = settings.allow_fp16_reduced_precision_reduction = False
    try:
        yield
    finally:
        settings.allow_bf16_reduced_precision_reduction, settings.allow_fp16_reduced_precision_reduction = (
            before
        )


class _RowSums:
    """dh and da of some rows, in float32 until they are finished."""

    def __init__(self, logits: Logits, dh_RD: Tensor | None, da_RL: Tensor | None) -> None:
        self.logits = logits
        self.pairs = [
            (factor, answer, torch.zeros_like(answer, dtype=torch.float32))
            for factor, answer in ((logits.w_VD, dh_RD), (logits.b_VR, da_RL))
            if factor is not None and answer is not None
        ]

    def add(self, dz_RK: Tensor, columns: slice) -> None:
        """Add what some columns contribute."""
        for factor, _, total in self.pairs:
            add_product(total, dz_RK, factor[columns])

    def finish(self) -> None:
        """Round the sums into their places."""
        for _, answer, total in self.pairs:
            answer.copy_(total)


class _Found:
    """The gradients; those that are sums over rows are float32 until the end, but for dw."""

    def __init__(self, logits: Logits, needs: Needs) -> None:
        self.logits = logits
        h_ND, w_VD, bias_V, a_NR, b_VR = logits[:5]
        low_rank = needs.low_rank and a_NR is not None

        def zeros(like: Tensor | None, wanted: bool, dtype: torch.dtype | None = None) -> Tensor | None:
            return None if like is None or not wanted else like.new_zeros(like.shape, dtype=dtype)

        self.dh_ND, self.da_NR = zeros(h_ND, needs.h), zeros(a_NR, low_rank)
        # Dw of 16 bits is put before anything is added to it, so that it need not be zeros: 0.3 ms per GB.
        is_put = len(h_ND) > 0 and w_VD.dtype != torch.float32
        self.dw_VD = w_VD.new_empty(w_VD.shape) if needs.w and is_put else zeros(w_VD, needs.w)
        self.dbias_V = zeros(bias_V, needs.bias, torch.float32)
        self.db_VR = zeros(b_VR, low_rank, torch.float32)

    def row_sums(self, rows: slice) -> _RowSums:
        """The sums of some rows."""
        dh_RD, da_RL = (None if answer is None else answer[rows] for answer in (self.dh_ND, self.da_NR))
        return _RowSums(self.logits, dh_RD, da_RL)

    def add(self, dz_RK: Tensor, block: Logits, columns: slice) -> None:
        """Add what a block's rows contribute to dbias and db."""
        if self.dbias_V is not None:
            self.dbias_V[columns] += dz_RK.sum(0, dtype=torch.float32)
        if self.db_VR is not None and block.a_NR is not None:
            add_product(self.db_VR[columns], dz_RK.T, block.a_NR)

    def new_dw(self, columns: slice, n_blocks: int) -> Tensor | None:
        """Where a part of dw is summed, if it is a sum: in its place, if that is float32."""
        if self.dw_VD is None or n_blocks == 1:
            return None
        if self.dw_VD.dtype == torch.float32:
            return self.dw_VD[columns]
        return torch.zeros_like(self.dw_VD[columns], dtype=torch.float32)

    def put_dw(self, columns: slice, dw_KD: Tensor | None) -> None:
        """Round a finished part of dw into its place."""
        if self.dw_VD is not None and dw_KD is not None and self.dw_VD.dtype != torch.float32:
            self.dw_VD[columns] = dw_KD

    def rounded(self) -> Gradients:
        """The gradients, in the dtypes of their inputs."""
        bias_V, b_VR = self.logits.bias_V, self.logits.b_VR
        return Gradients(
            dh_ND=self.dh_ND,
            dw_VD=self.dw_VD,
            dbias_V=None if self.dbias_V is None or bias_V is None else self.dbias_V.to(bias_V.dtype),
            da_NR=self.da_NR,
            db_VR=None if self.db_VR is None or b_VR is None else self.db_VR.to(b_VR.dtype),
        )
