"""The noise of a draw: a number for each (seed, token) that any backend computes alike, whatever its tiles.

    token drawn = argmax_v z_v + g_v        g_v = -log(-log(1 - u_v))    (Gumbel-max: a draw from softmax(z))
    u_v = (hash(seed, v) + 0.5) / 2^32

The hash mixes the token id with the low and then the high half of the seed (two rounds of the 32-bit
finaliser of MurmurHash3, Appleby 2011, public domain). It is not for cryptography.

Shape legend: R rows, K tokens of a tile.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def gumbel(seed_R: Tensor, token_K: Tensor, dtype: torch.dtype) -> Tensor:
    """The noise g of each row and token.

    Args:
        seed_R: int64 seeds, one per row.
        token_K: int64 token ids.
        dtype: of the answer; u is rounded to it before the logarithms.

    Returns:
        [R, K].
    """
    low_R1, high_R1 = (seed_R & _MASK)[:, None], ((seed_R >> 32) & _MASK)[:, None]
    bits_RK = _mixed(((token_K[None, :] * 0x9E3779B9) & _MASK) ^ low_R1)
    bits_RK = _mixed(bits_RK ^ high_R1)
    u_RK = (bits_RK.to(dtype) + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-u_RK))


def _mixed(bits: Tensor) -> Tensor:
    """The 32-bit finaliser, on int64 tensors that hold 32-bit numbers."""
    bits = bits ^ (bits >> 16)
    bits = (bits * 0x85EBCA6B) & _MASK
    bits = bits ^ (bits >> 13)
    bits = (bits * 0xC2B2AE35) & _MASK
    return bits ^ (bits >> 16)
