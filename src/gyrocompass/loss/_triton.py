"""The backend for GPUs, on Triton kernels (`_triton_kernels.py`) and the vendor's matrix products.

`sums` makes each tile of logits in registers, folds it into its rows' sums and forgets it: the head is read,
a few numbers per row are written.

`gradients` makes the logits once more and writes dz, in bf16 for bf16 inputs, for a bounded part of the
vocabulary; two products with float32 sums turn it into that part's dw, rounded once, and its share of dh.

`fused` keeps the float32 logits of a block of rows, and so makes them once. dw then comes in as many shares
as there are blocks, and [V, D] of float32 to add them up would be the largest thing in memory: for bf16 the
sum has 24 bits instead, 16 in the gradient and 8 beside it (each addition rounds to 2^-16 relative, the end
to 2^-8).

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
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from gyrocompass.loss._chunked import asks_of, joined, part_of, row_blocks
from gyrocompass.loss._question import Asks, Gradients, Logits, Needs, Picks, Slopes, SlopesOf, Sums
from gyrocompass.loss._triton_launch import Ready, launch_add_dw, launch_dz, launch_sums, ready

ROWS = 1 << 15
"""Rows at a time, at most, where no logits are kept: their parts' sums take some 3 KB each."""
DZ_ELEMENTS = 1 << 26
"""Of dz at a time: 128 MB in bf16."""
COLUMNS = 16384
"""Of dz at a time, at most: a part of dw in float32 has as many rows."""
KEPT_ELEMENTS = 80 << 20
"""Logits that `fused` keeps at a time: 320 MB in float32."""
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
        if on_gpu and torch.__version__ < "2.12":
            return f"torch {torch.__version__} has no float32 sums of 16-bit products; 2.12 has"
        for left, right in ((logits.h_ND, logits.w_VD), (logits.a_NR, logits.b_VR)):
            if left is not None and right is not None and left.dtype != right.dtype:
                return f"it has no product of {left.dtype} and {right.dtype}"
        return "float64 is not supported" if logits.dtype == torch.float64 else None

    def sums(self, logits: Logits, picks: Picks, asks: Asks) -> Sums:
        """One pass over the logits, made in registers."""
        with _on_device(logits.h_ND):
            found = [
                launch_sums(_block(logits, picks, rows, own), asks_of(asks, rows), None)
                for rows, own in _row_blocks(logits, picks, ROWS)
            ]
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
                dw_KD = found.new_dw(columns)
                for block, block_slopes, row_sums in blocks:
                    dz_RK = launch_dz(block, block_slopes, columns, None)
                    row_sums.add(dz_RK, columns)
                    found.add(dz_RK, block.logits, columns)
                    if dw_KD is not None:
                        add_product(dw_KD, dz_RK.T, block.logits.h_ND)
                found.put_dw(columns, dw_KD)
            for _, _, row_sums in blocks:
                row_sums.finish()
            return found.rounded()

    def fused(
        self, logits: Logits, picks: Picks, asks: Asks, slopes_of: SlopesOf, needs: Needs
    ) -> tuple[Sums, Gradients]:
        """Blocks of rows whose float32 logits are kept between the two passes."""
        with _on_device(logits.h_ND):
            found, sums = _Found(logits, needs), []
            blocks = list(_row_blocks(logits, picks, max(1, KEPT_ELEMENTS // len(logits.w_VD))))
            head_sum = _HeadSum(found.dw_VD, len(blocks))
            room_RV = _room(logits, blocks)
            for rows, own in blocks:
                block, row_sums = _block(logits, picks, rows, own), found.row_sums(rows)
                y_RV = _kept(block.logits, room_RV)
                sums.append(launch_sums(block, asks_of(asks, rows), y_RV))
                slopes = slopes_of(rows, sums[-1], own)
                for columns in _parts(len(logits.w_VD), rows.stop - rows.start):
                    dz_RK = launch_dz(block, slopes, columns, y_RV)
                    row_sums.add(dz_RK, columns)
                    found.add(dz_RK, block.logits, columns)
                    head_sum.add(dz_RK, block.logits.h_ND, columns)
                row_sums.finish()
                head_sum.next_block()
            head_sum.finish()
            return joined(sums, lambda: self.sums(logits, picks, asks)), found.rounded()

    def prefers_fused(self, logits: Logits, needs: Needs) -> bool:
        """Where a product saved costs more than writing and reading its logits, and dw is added to seldom.

        An estimate from published bandwidths and rates, not a measurement: 2 D operations of a product at
        600 Tflop/s against 8 bytes at 3 TB/s; and one addition to dw moves as many bytes as a product over
        some 500 rows takes time.
        """
        n_rows, (vocabulary, width) = len(logits.h_ND), logits.w_VD.shape
        rows_kept = KEPT_ELEMENTS // vocabulary
        return width >= 1024 and (not needs.w or rows_kept >= min(512, n_rows))


def _on_device(h_ND: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Kernels are launched on the current GPU: make it the tensors' own."""
    return torch.cuda.device(h_ND.device) if h_ND.is_cuda else contextlib.nullcontext()


def _row_blocks(logits: Logits, picks: Picks, n_block: int) -> list[tuple[slice, slice]]:
    """Rows in blocks, and the picks of each; a single block does not wait for the GPU to count them."""
    if 0 < len(logits.h_ND) <= n_block:
        return [(slice(0, len(logits.h_ND)), slice(0, len(picks.row_P)))]
    return list(row_blocks(logits, picks, n_block * len(logits.w_VD)))


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


def _room(logits: Logits, blocks: list[tuple[slice, slice]]) -> Tensor:
    """Room for the logits of the largest block, which is the first."""
    n_rows = blocks[0][0].stop if blocks else 0
    return logits.h_ND.new_empty(n_rows, len(logits.w_VD), dtype=torch.float32)


def _kept(logits: Logits, room_RV: Tensor) -> Tensor:
    """h w^T + a b^T of a block of rows, in float32."""
    h_ND, w_VD, _, a_NR, b_VR = logits[:5]
    y_RV = room_RV[: len(h_ND)]
    if h_ND.is_cuda and h_ND.dtype != torch.float32:
        torch.mm(h_ND, w_VD.T, out_dtype=torch.float32, out=y_RV)
    else:
        torch.mm(h_ND.float(), w_VD.float().T, out=y_RV)
    if a_NR is not None and b_VR is not None:
        add_product(y_RV, a_NR, b_VR.T)
    return y_RV


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right; a float32 total of 16-bit factors too."""
    if total.is_cuda and left.dtype == right.dtype != torch.float32:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(left.float(), right.float())


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

        self.dh_ND, self.dw_VD, self.da_NR = zeros(h_ND, needs.h), zeros(w_VD, needs.w), zeros(a_NR, low_rank)
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

    def new_dw(self, columns: slice) -> Tensor | None:
        """Where a part of dw is summed: in its place, if that is float32."""
        if self.dw_VD is None or self.dw_VD.dtype == torch.float32:
            return None if self.dw_VD is None else self.dw_VD[columns]
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


class _HeadSum:
    """dw in shares of one block of rows after the other.

    bf16: in 24 bits, by `launch_add_dw`. float32: in its place. float16: in a float32 sum beside it.
    """

    def __init__(self, dw_VD: Tensor | None, n_blocks: int) -> None:
        self.dw_VD, self.n_blocks, self.n_done = dw_VD, n_blocks, 0
        self.low_VD = self.sum_VD = None
        if dw_VD is None:
            return
        if dw_VD.dtype == torch.bfloat16:
            # With a single block there is nothing to carry.
            shape = dw_VD.shape if n_blocks > 1 else (0, dw_VD.shape[1])
            self.low_VD = dw_VD.new_empty(shape, dtype=torch.uint8)
        else:
            self.sum_VD = dw_VD if dw_VD.dtype == torch.float32 else dw_VD.float()

    def add(self, dz_RK: Tensor, h_RD: Tensor, columns: slice) -> None:
        """Add the share of a block's rows in some columns."""
        if self.sum_VD is not None:
            add_product(self.sum_VD[columns], dz_RK.T, h_RD)
        elif self.dw_VD is not None and self.low_VD is not None:
            first, last = self.n_done == 0, self.n_done == self.n_blocks - 1
            launch_add_dw(dz_RK, h_RD, self.dw_VD[columns], self.low_VD[columns], first=first, last=last)

    def next_block(self) -> None:
        """A block of rows is finished."""
        self.n_done += 1

    def finish(self) -> None:
        """Round what is not rounded yet."""
        if self.dw_VD is not None and self.sum_VD is not None and self.sum_VD is not self.dw_VD:
            self.dw_VD.copy_(self.sum_VD)
