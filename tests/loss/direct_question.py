"""One question to a backend, bare or with everything in it, at sizes on both sides of every inner block.

Shape legend: N rows, D hidden width, V vocabulary, P picks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from direct_backend import direct_sums, full_logits
from torch import Tensor

from gyrocompass.loss._question import Asks, LogitRule, Logits, Needs, Picks, Slopes, Sums

EVERYTHING = Needs(True, True, True, True)

# Both sides of 16 lanes, of blocks of 256 tokens and of tiles of 256 tokens of vocabulary; deep and flat.
SIZES = [
    (300, 192, 5000),
    (513, 31, 700),
    (1, 1, 1),
    (17, 7, 33),
    (40, 2048, 300),
    (257, 65, 257),
    (5, 576, 4100),
]


class Case(NamedTuple):
    logits: Logits
    picks: Picks
    asks: Asks
    slopes: Slopes


def make(size: tuple[int, int, int], dtype: torch.dtype, *, plain: bool) -> Case:
    """A question: the bare cross-entropy, or with everything that can be asked."""
    n_rows, width, vocabulary = size
    generator = torch.Generator().manual_seed(sum(size))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    h_ND, w_VD = normal(n_rows, width).to(dtype), (normal(vocabulary, width) / width**0.5).to(dtype)
    row_P = torch.arange(n_rows).repeat_interleave(1 if plain else 3)
    picks = Picks(row_P, torch.randint(0 if plain else -1, vocabulary, row_P.shape, generator=generator))
    logits, asks = Logits(h_ND, w_VD, None, None, None, LogitRule()), Asks()
    if not plain:
        bias_V = normal(vocabulary)
        bias_V[::7] = -torch.inf
        bias_V[vocabulary // 2] = 0.5
        low_rank = normal(n_rows, 3).to(dtype), normal(vocabulary, 3).to(dtype)
        logits = Logits(h_ND, w_VD, bias_V.to(dtype), *low_rank, LogitRule(30.0, 0.5, 0.7))
        logits = logits._replace(floor_N=gap(logits, 0.2, 0.4))
        seed_N = torch.randint(-(2**62), 2**62, (n_rows,), generator=generator)
        asks = Asks(True, True, True, gap(logits, 0.5, 0.9), min(5, vocabulary), seed_N, 1000)
    expected = direct_sums(logits, picks, asks)
    top_N, exp_N = expected.top_N.float(), expected.exp_N.float().clamp(min=1.0)
    weight_N = normal(n_rows)
    if plain:
        slopes = Slopes(top_N, weight_N / exp_N, None, None, None, -weight_N)
    else:
        parts = (
            normal(n_rows) / exp_N,
            normal(n_rows) / exp_N,
            normal(n_rows) / exp_N,
            normal(n_rows) / vocabulary,
        )
        slopes = Slopes(top_N, *parts, normal(len(row_P)))
    return Case(logits, picks, asks, slopes)


def gap(logits: Logits, low: float, high: float) -> Tensor:
    """Per row a number between two quantiles and far from every logit: rounding decides nothing."""
    z_NV = full_logits(logits)[0].sort(1).values
    z_NV = z_NV[:, z_NV[0].isneginf().sum() :]
    first, last = int(low * z_NV.shape[1]), int(high * z_NV.shape[1])
    if last <= first + 1:
        return (z_NV[:, 0] - 1).float()
    widest_N1 = (z_NV[:, first + 1 : last] - z_NV[:, first : last - 1]).argmax(1, keepdim=True) + first
    return ((z_NV.gather(1, widest_N1) + z_NV.gather(1, widest_N1 + 1)) / 2)[:, 0].float()


def log_probs(sums: Sums, picks: Picks) -> Tensor:
    """log p of the picks, from the sums."""
    return sums.pick_P - sums.top_N[picks.row_P] - sums.exp_N.log()[picks.row_P]
