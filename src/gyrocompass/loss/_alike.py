"""A matrix product whose rows get the same bits wherever they stand in it.

No BLAS promises that. MKL's float64 product on an AMD processor, for one, sums a row that begins at an odd
multiple of 8 bytes in another order than one that begins at a multiple of 16: with an odd number of columns,
every second row.

So a product is tried out before its first use, with rows that are all equal, in the shapes, the strides, the
places within a cache line and the number of threads of the real one. If its rows come out equal, it is used
as it is. If not, the rows are copied so that each begins on a cache line, and that is tried. If even then
they come out different, each is multiplied alone, which leaves nothing to differ by.

A trial costs one product and the random numbers for it, and for a moment the memory of both factors and the
result; its finding is kept. The copies made invariant mode up to a tenth slower, rows alone would make it
four to eight times as slow (1024 rows, a width of 257 and 8192 tokens on one core of an AMD processor).

Left out: bf16 results, in which a trial could miss a difference that rounding hides.

Shape legend: R rows, Y summed over, X columns.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

LINE_BYTES = 64
"""Of a cache line; what torch allocates begins on one."""


class _Layout(NamedTuple):
    """What of a factor, other than its numbers, may decide how a product is computed."""

    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    """Elements since the beginning of a cache line."""


def addmm_alike(total_RX: Tensor, left_RY: Tensor, right_YX: Tensor, *, beta: float = 1.0) -> None:
    """total = beta total + left @ right, in place; each row's bits are its own."""
    if _rows_are_alike(total_RX, left_RY, right_YX, beta):
        total_RX.addmm_(left_RY, right_YX, beta=beta)
        return
    sum_RX, rows_RY = _on_lines(total_RX), _on_lines(left_RY)
    step = len(rows_RY) if _rows_are_alike(sum_RX, rows_RY, right_YX, beta) else 1
    for sum_SX, rows_SY in zip(sum_RX.split(step), rows_RY.split(step), strict=True):
        sum_SX.addmm_(rows_SY, right_YX, beta=beta)
    total_RX.copy_(sum_RX)


def _on_lines(part: Tensor) -> Tensor:
    """A copy whose rows begin on cache lines."""
    in_line = LINE_BYTES // part.element_size()
    width = part.shape[1]
    return part.new_empty(len(part), -(-width // in_line) * in_line)[:, :width].copy_(part)


def _rows_are_alike(total_RX: Tensor, left_RY: Tensor, right_YX: Tensor, beta: float) -> bool:
    """Whether the product, in these layouts, has been seen to give equal rows for equal rows."""
    layouts = tuple(
        _Layout(part.shape, part.stride(), part.data_ptr() % LINE_BYTES // part.element_size())
        for part in (total_RX, left_RY, right_YX)
    )
    return _trial(layouts, beta, total_RX.dtype, total_RX.device, torch.get_num_threads())


@functools.cache
def _trial(
    layouts: tuple[_Layout, ...], beta: float, dtype: torch.dtype, device: torch.device, n_threads: int
) -> bool:
    """Whether equal rows come out equal, with random numbers; `n_threads` is only here to be looked up by."""
    generator = torch.Generator(device).manual_seed(0)
    factors = []
    for shape, stride, offset in layouts:
        last = sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        room = torch.randn(offset + last + 1, dtype=dtype, device=device, generator=generator)
        factors.append(room.as_strided(shape, stride, offset))
    total_RX, left_RY, right_YX = factors
    for part in (total_RX, left_RY):
        part.copy_(part[:1].clone())
    total_RX.addmm_(left_RY, right_YX, beta=beta)
    return torch.equal(total_RX, total_RX[:1].expand_as(total_RX))
