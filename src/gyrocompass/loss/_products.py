"""The head's matrix products by tile, at the best speed that keeps float32 logits.

`WideProducts` widens a tile of w to float32 (float64 if any input is) and multiplies there: every device,
every mixture of dtypes.

`AmxProducts` is for bf16 on a CPU with AMX, where a bf16 product is several times faster than a float32 one
but rounds its output to 8 bits. Logits are float32 products there too: two bf16 ones, the second of what the
first left, are exact to 2^-18 of a logit and no more, which ten times the promised error came of. In the
gradient's products dz is rounded to bf16, as the gradients themselves are in the end; sums over tiles are
float32 all the same.

A low-rank addition to the head (h w^T + a b^T) is extra columns: [h a] [w b]^T, with [w b] put together for
one tile at a time. D counts these columns here.

torch can also let float32 products run on bf16 units, but only by a switch of the whole process, which would
change the numbers of whatever else is running.

Shape legend: N counted tokens, D hidden width and extra columns, V vocabulary; a tile is R tokens by K
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from gyrocompass.loss._alike import addmm_alike
from gyrocompass.loss._question import Logits


class Products(Protocol):
    """Products of one tile; `enter` names its part of the vocabulary."""

    def enter(self, columns: slice) -> None:
        """Prepare w[columns] for the products that follow."""

    def logits(self, rows: slice, z_RK: Tensor) -> None:
        """z = h[rows] @ w[columns]^T, in the dtype of z."""

    def add_dh(self, dz_RK: Tensor, wanted: slice, dh_RW: Tensor) -> None:
        """dh += dz @ w[columns], of the wanted columns of h."""

    def add_dw(self, dz_RK: Tensor, rows: slice, wanted: slice, dw_KW: Tensor) -> None:
        """dw += dz^T @ h[rows], of the wanted columns of w."""


def products_for(logits: Logits, shape: tuple[int, int], *, alike: bool = False) -> Products:
    """The fastest products for the dtypes and the device, with tiles of at most a shape (R, K).

    Alike: float32 and float64 logits and dh have the bits of their row, whatever its place in the tile.
    """
    factors = [
        factor for factor in (logits.h_ND, logits.w_VD, logits.a_NR, logits.b_VR) if factor is not None
    ]
    narrow = all(factor.dtype == torch.bfloat16 for factor in factors) and logits.dtype == torch.float32
    if narrow and logits.h_ND.device.type == "cpu" and torch.cpu._is_amx_tile_supported():
        return AmxProducts(logits, shape)
    return WideProducts(logits, addmm_alike if alike else Tensor.addmm_)


def _with_extra(factor: Tensor, extra: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A factor with its extra columns, in a dtype; the factor itself where nothing is to be done."""
    factor = factor.to(dtype)
    return factor if extra is None else torch.cat([factor, extra.to(dtype)], dim=1)


class _Factors:
    """Both sides of the product: h whole, w by tile."""

    def __init__(self, logits: Logits, dtype: torch.dtype) -> None:
        self._w_VD, self._b_VR = logits.w_VD, logits.b_VR
        self.h_ND = _with_extra(logits.h_ND, logits.a_NR, dtype)
        self.w_KD = self.h_ND.new_empty(0, 0)

    def enter(self, columns: slice) -> None:
        """Prepare w[columns]."""
        extra = None if self._b_VR is None else self._b_VR[columns]
        self.w_KD = _with_extra(self._w_VD[columns], extra, self.h_ND.dtype)


class WideProducts(_Factors):
    """Products in float32 or float64."""

    def __init__(self, logits: Logits, addmm: Callable[..., object]) -> None:
        super().__init__(logits, logits.dtype)
        self._addmm = addmm

    def logits(self, rows: slice, z_RK: Tensor) -> None:
        self._addmm(z_RK, self.h_ND[rows], self.w_KD.T, beta=0.0)

    def add_dh(self, dz_RK: Tensor, wanted: slice, dh_RW: Tensor) -> None:
        self._addmm(dh_RW, dz_RK, self.w_KD[:, wanted])

    def add_dw(self, dz_RK: Tensor, rows: slice, wanted: slice, dw_KW: Tensor) -> None:
        dw_KW.addmm_(dz_RK.T, self.h_ND[rows, wanted])


class AmxProducts(_Factors):
    """Logits in float32, gradients on bf16 units.

    Gradients pass through two buffers that are made once: a fresh tensor of a tile's size costs as much in
    page faults as the product itself.
    """

    def __init__(self, logits: Logits, shape: tuple[int, int]) -> None:
        super().__init__(logits, torch.bfloat16)
        (n_rows, n_columns), width = shape, self.h_ND.shape[1]
        elements = max(n_rows * n_columns, n_rows * width, n_columns * width)
        self._narrow = self.h_ND.new_empty(elements)
        self._wide = self.h_ND.new_empty(elements, dtype=torch.float32)
        self._wide_h_ND, self._wide_w_KD = self.h_ND.float(), self.w_KD.float()

    def enter(self, columns: slice) -> None:
        super().enter(columns)
        self._wide_w_KD = self.w_KD.float()

    def logits(self, rows: slice, z_RK: Tensor) -> None:
        z_RK.addmm_(self._wide_h_ND[rows], self._wide_w_KD.T, beta=0.0)

    def add_dh(self, dz_RK: Tensor, wanted: slice, dh_RW: Tensor) -> None:
        self._add_product(_room(self._narrow, dz_RK).copy_(dz_RK), self.w_KD[:, wanted], dh_RW)

    def add_dw(self, dz_RK: Tensor, rows: slice, wanted: slice, dw_KW: Tensor) -> None:
        self._add_product(_room(self._narrow, dz_RK).copy_(dz_RK).T, self.h_ND[rows, wanted], dw_KW)

    def _add_product(self, left: Tensor, right: Tensor, total: Tensor) -> None:
        """total += left @ right; only the product of this tile is rounded to bf16, the sum is not."""
        total.add_(_room(self._wide, total).copy_(left @ right))


def _room(buffer: Tensor, like: Tensor) -> Tensor:
    """The beginning of a buffer, in the shape of another tensor."""
    return buffer[: like.numel()].view(like.shape)
