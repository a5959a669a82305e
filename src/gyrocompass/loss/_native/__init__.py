"""The native backend: both passes in C++ over cache-sized tiles of logits, on a CPU with AVX-512.

    sums:       z^T tile = w tile . h^T -> statistics of the tile, while it is in the cache
    gradients:  the tile once more -> dz in the inputs' dtype -> dh += dz w, dw = dz^T h

It is for hidden states and head both in bf16 or both in float32. Products go through ATen's brgemm: bf16 by
bf16 with float32 sums (on matrix units where there are any), so logits are never rounded. What the two passes
hold beyond inputs and gradients is a packed copy of h, float32 sums of dh and dz of a range of some hundred
tokens of the vocabulary (or the kept logits): nothing of size N x V, no copy of the head. Results do not
depend on the number of threads.

`fused` keeps float32 logits of a block of rows from one pass to the other, where that takes less time than
making them twice; else it is the two passes one after the other. A gradient of a bf16 head is then a sum over
blocks; until the last one it is whole numbers of 16 bits times a factor for each 256 columns of a row, in the
gradient's own place (each addition rounds to 2^-16 of the largest there). float16 and mixtures of dtypes are
left to the chunked backend.

The C++ beside this file: `lanes.h` (elementary functions), `matrix.h` (products and layouts), `logits.h`
(tiles), `sums.h` and `gradients.h` (the passes), `native.cpp` (the operators). `_build.py` compiles it.

Shape legend: N counted tokens, D hidden width, V vocabulary, R rank of a low-rank addition to the head,
P picks, K tokens of a top list, S parts of the vocabulary, F statistics.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from gyrocompass.loss._native._build import Status, status
from gyrocompass.loss._question import (
    Asks,
    Gradients,
    Logits,
    Needs,
    Picks,
    Slopes,
    SlopesOf,
    Sums,
)

__all__ = ["NativeBackend", "Status", "status"]

_LOWEST_X = -200.0
"""exp of less is 0 in the operators."""
_KEPT_BYTES = 48 << 20
"""Of logits that the fused route keeps."""
_FEWEST_ROWS = 192
"""Of a block of them: with fewer, reading the head and adding to its gradient for each block takes longer
than making logits twice."""


class NativeBackend:
    """The backend in C++."""

    name = "native"

    def refusal(self, logits: Logits) -> str | None:
        """Why not, in a sentence; the C++ is built when the first inputs come that it could take."""
        return self.unsuited(logits) or status().refusal(logits.h_ND.dtype)

    def unsuited(self, logits: Logits) -> str | None:
        """Why no machine would take these inputs natively, or None."""
        if any(tensor.device.type != "cpu" for tensor in logits.given):
            return "the native backend is for tensors on the CPU"
        factors = (logits.h_ND, logits.w_VD, logits.a_NR, logits.b_VR)
        dtypes = {tensor.dtype for tensor in factors if tensor is not None}
        if dtypes not in ({torch.bfloat16}, {torch.float32}) or logits.dtype != torch.float32:
            return "the native backend takes hidden states and head both in bfloat16, or both in float32"
        if any(tensor is not None and tensor.shape[1] == 0 for tensor in factors):
            return "the native backend takes factors of at least one column"
        return None

    def sums(self, logits: Logits, picks: Picks, asks: Asks) -> Sums:
        """One pass over the logits."""
        return _sums(logits, picks, asks, None)

    def gradients(self, logits: Logits, picks: Picks, slopes: Slopes, needs: Needs) -> Gradients:
        """The pass back."""
        if len(logits.h_ND) == 0:
            return _no_gradients(logits, needs)
        return _gradients_of(logits, needs, _gradient_parts(logits, picks, slopes, needs, None, [])[:5])

    def fused(
        self, logits: Logits, picks: Picks, asks: Asks, slopes_of: SlopesOf, needs: Needs
    ) -> tuple[Sums, Gradients]:
        """Blocks of rows whose logits are kept, where that pays; else the two passes, with one block."""
        n_rows = len(logits.h_ND)
        rows_each = _rows_to_keep(logits, needs)
        if rows_each == 0 or n_rows == 0:
            sums = self.sums(logits, picks, asks)
            slopes = slopes_of(slice(0, n_rows), sums, slice(0, len(picks.row_P)))
            return sums, self.gradients(logits, picks, slopes, needs)
        kept = torch.empty(
            _operators().kept_floats(rows_each, *logits.w_VD.shape, logits.h_ND.element_size())
        )
        dh_ND, da_NR = _empty_if(needs.h, logits.h_ND), _empty_if(needs.low_rank, logits.a_NR)
        answers: list[Sums] = []
        parts: list[Tensor] = []
        for rows in _blocks(n_rows, rows_each):
            block, own = _of_rows(logits, rows), _picks_of(picks, rows)
            own_picks = Picks(picks.row_P[own] - rows.start, picks.token_P[own])
            answers.append(_sums(block, own_picks, _asks_of(asks, rows), kept))
            slopes = slopes_of(rows, answers[-1], own)
            shared = [parts[1], parts[3], *parts[4:]] if parts else []
            last = rows.stop == n_rows
            parts = _gradient_parts(block, own_picks, slopes, needs, kept, shared, last=last)
            for whole, part in ((dh_ND, parts[0]), (da_NR, parts[2])):
                if whole is not None:
                    whole[rows] = part[:, : whole.shape[1]]
        return _joined(answers), _gradients_of(logits, needs, [dh_ND, parts[1], da_NR, *parts[3:5]])

    def prefers_fused(self, logits: Logits, needs: Needs) -> bool:
        """Where blocks of logits can be kept that are large enough to pay for reading the head for each."""
        return _rows_to_keep(logits, needs) > 0


def _rows_to_keep(logits: Logits, needs: Needs) -> int:
    """How many rows' logits are kept at once; 0 where two passes are as fast.

    Where a bf16 head has a gradient, each block adds to it: with matrix units, making logits once more costs
    less (decision 0020).
    """
    n_rows, room = len(logits.h_ND), _KEPT_BYTES
    if logits.h_ND.dtype == torch.bfloat16 and (needs.w or (needs.low_rank and logits.b_VR is not None)):
        if _has_matrix_units():
            return 0
        room = max(room, logits.w_VD.nbytes // 2)
    most = room // (4 * len(logits.w_VD)) // 32 * 32
    if most < min(n_rows, _FEWEST_ROWS):
        return 0
    return math.ceil(n_rows / math.ceil(max(n_rows, 1) / most))


@functools.cache
def _has_matrix_units() -> bool:
    return torch.cpu._is_amx_tile_supported()


def _blocks(n_rows: int, each: int) -> Iterator[slice]:
    for start in range(0, n_rows, each):
        yield slice(start, min(start + each, n_rows))


def _of_rows(logits: Logits, rows: slice) -> Logits:
    a_NR, floor_N = (None if part is None else part[rows] for part in (logits.a_NR, logits.floor_N))
    return logits._replace(h_ND=logits.h_ND[rows], a_NR=a_NR, floor_N=floor_N)


def _asks_of(asks: Asks, rows: slice) -> Asks:
    threshold_N, seed_N = (None if part is None else part[rows] for part in (asks.threshold_N, asks.seed_N))
    return asks._replace(threshold_N=threshold_N, seed_N=seed_N)


def _picks_of(picks: Picks, rows: slice) -> slice:
    """Which picks are of these rows."""
    edges = torch.tensor([rows.start, rows.stop])
    return slice(*torch.searchsorted(picks.row_P.contiguous(), edges).tolist())


def _empty_if(needed: bool, like: Tensor | None) -> Tensor | None:
    return torch.empty_like(like) if needed and like is not None else None


def _joined(parts: list[Sums]) -> Sums:
    """The sums of all blocks, in one piece."""
    columns = zip(*parts, strict=True)
    return Sums(*(None if column[0] is None else torch.cat(column) for column in columns))  # type: ignore[arg-type]


def _sums(logits: Logits, picks: Picks, asks: Asks, kept: Tensor | None) -> Sums:
    """The forward pass; the logits are left in `kept`."""
    if len(logits.h_ND) == 0:
        return _no_sums(logits, asks)
    parts = _operators().sums(
        *_given(logits),
        kept,
        picks.row_P.contiguous(),
        picks.token_P.contiguous(),
        asks.mean_logit,
        _maybe(asks.threshold_N),
        min(asks.top, len(logits.w_VD)),
        None if asks.seed_N is None else asks.seed_N.contiguous(),
        asks.first_token,
    )
    return _merged(len(logits.h_ND), asks, *parts)


def _gradient_parts(
    logits: Logits,
    picks: Picks,
    slopes: Slopes,
    needs: Needs,
    kept: Tensor | None,
    shared: list[Tensor],
    *,
    last: bool = True,
) -> list[Tensor]:
    """The operator's pass back over kept logits, if any, adding to `shared` if that is not empty.

    Returns:
        dh, dw, da, db, dbias, and what dw and db are times unless this is the `last` pass: empty where they
        are not needed.
    """
    parts: list[Tensor] = _operators().gradients(
        *_given(logits),
        kept,
        picks.row_P.contiguous(),
        picks.token_P.contiguous(),
        shared,
        *(_maybe(slope) for slope in slopes),
        needs.h,
        needs.w,
        needs.bias and logits.bias_V is not None,
        needs.low_rank and logits.a_NR is not None,
        last,
    )
    return parts


def _gradients_of(logits: Logits, needs: Needs, parts: Sequence[Tensor | None]) -> Gradients:
    """The operator's answer in the dtypes of the inputs."""
    wanted = (needs.h, needs.w, needs.bias, needs.low_rank, needs.low_rank)
    dh_ND, dw_VD, da_NR, db_VR, dbias_V = parts
    given = zip(logits[:5], (dh_ND, dw_VD, dbias_V, da_NR, db_VR), wanted, strict=True)
    return Gradients(*(_like(tensor, part) if want else None for tensor, part, want in given))


def _operators() -> Any:
    """The C++, built by now unless `refusal` was not asked."""
    built = status()
    assert built.available, built.reason
    return torch.ops.gyrocompass_native


def _given(logits: Logits) -> tuple[Any, ...]:
    """The logits as the operators' first arguments."""
    h_ND, w_VD, bias_V, a_NR, b_VR, rule, floor_N = logits
    return (
        _factor(h_ND),
        _factor(w_VD),
        _maybe(bias_V),
        None if a_NR is None else _factor(a_NR),
        None if b_VR is None else _factor(b_VR),
        _maybe(floor_N),
        rule.softcap or 0.0,
        rule.logit_scale,
        rule.temperature,
    )


def _factor(tensor: Tensor) -> Tensor:
    """Rows that lie in one piece; those of bf16 of even width, because the products take pairs."""
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16 and tensor.shape[1] % 2:
        return pad(tensor, (0, 1))
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def _maybe(tensor: Tensor | None) -> Tensor | None:
    """float32 and in one piece."""
    return None if tensor is None else tensor.detach().float().contiguous()


def _like(given: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    """Without the column that made the width even, and in the dtype of what was given; None if it was not."""
    if given is None or gradient is None:
        return None
    if gradient.shape != given.shape:
        gradient = gradient[:, : given.shape[1]].contiguous()
    return gradient.to(given.dtype)


def _merged(
    n_rows: int,
    asks: Asks,
    numbers_SFN: Tensor,
    wholes_SFN: Tensor,
    pick_P: Tensor,
    top_SNK: Tensor,
    token_SNK: Tensor,
) -> Sums:
    """Sums of parts of the vocabulary, each relative to its own largest logit, become sums of all of it."""
    top_SN, exp_SN, exp_x_SN, exp_sq_SN, z_SN, key_SN = numbers_SFN[:, :, :n_rows].unbind(1)
    count_SN, above_SN, drawn_SN = wholes_SFN[:, :, :n_rows].unbind(1)
    top_N = top_SN.amax(0)
    change_SN = (top_SN - top_N).clamp_(min=_LOWEST_X)
    factor_SN = change_SN.exp()
    drawn_N = key_N = top_NK = top_token_NK = None
    if asks.seed_N is not None:
        key_N, part_N = key_SN.max(0)
        drawn_N = drawn_SN.gather(0, part_N[None])[0].long()
    if asks.top:
        top_NK, order_NK = _by_row(top_SNK).sort(dim=1, descending=True, stable=True)
        top_NK, order_NK = (part[:, : top_SNK.shape[2]] for part in (top_NK, order_NK))
        top_token_NK = _by_row(token_SNK).gather(1, order_NK)
    return Sums(
        top_N=top_N,
        exp_N=(factor_SN * exp_SN).sum(0),
        pick_P=pick_P,
        exp_x_N=(factor_SN * (exp_x_SN + change_SN * exp_SN)).sum(0) if asks.entropy else None,
        exp_sq_N=(factor_SN.square() * exp_sq_SN).sum(0) if asks.sum_sq else None,
        z_N=z_SN.sum(0) if asks.mean_logit else None,
        count_N=count_SN.sum(0).float() if asks.mean_logit else None,
        above_N=None if asks.threshold_N is None else above_SN.sum(0),
        top_NK=top_NK,
        top_token_NK=top_token_NK,
        drawn_N=drawn_N,
        drawn_key_N=key_N,
    )


def _by_row(part_SNK: Tensor) -> Tensor:
    """The lists of all parts side by side, [N, S * K]."""
    return part_SNK.transpose(0, 1).flatten(1)


def _no_sums(logits: Logits, asks: Asks) -> Sums:
    """The sums of no rows."""
    top = min(asks.top, len(logits.w_VD))

    def none_if(unasked: bool, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor | None:
        return None if unasked else torch.empty(0, *shape, dtype=dtype)

    return Sums(
        top_N=torch.empty(0),
        exp_N=torch.empty(0),
        pick_P=torch.empty(0),
        exp_x_N=none_if(not asks.entropy),
        exp_sq_N=none_if(not asks.sum_sq),
        z_N=none_if(not asks.mean_logit),
        count_N=none_if(not asks.mean_logit),
        above_N=none_if(asks.threshold_N is None, dtype=torch.int64),
        top_NK=none_if(top == 0, top),
        top_token_NK=none_if(top == 0, top, dtype=torch.int64),
        drawn_N=none_if(asks.seed_N is None, dtype=torch.int64),
        drawn_key_N=none_if(asks.seed_N is None),
    )


def _no_gradients(logits: Logits, needs: Needs) -> Gradients:
    """The gradients of no rows: nothing."""
    wanted = (needs.h, needs.w, needs.bias, needs.low_rank, needs.low_rank)
    return Gradients(
        *(
            torch.zeros_like(tensor) if want and tensor is not None else None
            for tensor, want in zip(logits[:5], wanted, strict=True)
        )
    )
