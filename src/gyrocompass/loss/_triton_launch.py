"""Launching the Triton kernels: which tensors, how many programs, and the parts' sums merged in the end.

The vocabulary is cut into parts of a fixed size, each a program's work, so that few rows too keep all
processors busy, and so that the order in which a row's numbers are added does not depend on how many rows
there are. With x relative to each part's own largest logit, and d = top of the part - top of all:

    sum e^x = sum_parts e^d exp       sum x e^x = sum_parts e^d (exp_x + d exp)

Nothing here waits for the GPU.

Shape legend: N rows, D hidden width, V vocabulary, L a low rank, P picks, R rows and K tokens of a tile,
S parts of the vocabulary, F numbers per row and part, J candidates for the K of a top list.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gyrocompass.loss._question import Asks, Logits, Picks, Slopes, Sums

PART = 2048
"""Tokens of the vocabulary that one program of `launch_sums` goes through; more where it keeps top lists."""
TOKENS_PER_SLOT = 256
"""Of that part, for each slot of a top list, at least: lists are small beside what they are made from."""
LIST_ELEMENTS = 2048
"""Of the top lists of one tile's rows: they live in registers."""


@functools.cache
def kernels() -> ModuleType:
    """The kernels; imported when first used, because triton is not installed everywhere."""
    from gyrocompass.loss import _triton_kernels

    return _triton_kernels


class Ready(NamedTuple):
    """A question as kernels take it."""

    logits: Logits
    """With contiguous h, bias, a, b and floor."""
    start_N1: Tensor
    """int64 [N + 1]: where each row's picks begin."""
    token_P: Tensor
    gain: float
    cap: float | None
    """z = cap * tanh(gain * y), or gain * y without a cap."""


def ready(logits: Logits, picks: Picks) -> Ready:
    """Find where each row's picks begin, and fold scale, softcap and temperature into two factors."""
    softcap, scale, temperature = logits.rule
    row_N1 = torch.arange(len(logits.h_ND) + 1, device=logits.h_ND.device)
    return Ready(
        logits._replace(
            h_ND=logits.h_ND.contiguous(),
            bias_V=_contiguous(logits.bias_V),
            a_NR=_contiguous(logits.a_NR),
            b_VR=_contiguous(logits.b_VR),
            floor_N=_contiguous(logits.floor_N),
        ),
        torch.searchsorted(picks.row_P.contiguous(), row_N1),
        picks.token_P.contiguous(),
        scale / (temperature if softcap is None else softcap),
        None if softcap is None else softcap / temperature,
    )


READ_TILES = {"sums": (1, 1024, 4), "dz": (16, 256, 4)}
"""Rows, columns and warps of a tile that is read: what was fastest of ten shapes on an H200."""
TILE_OF_NUMPY = {"BLOCK_R": 32, "BLOCK_K": 64, "BLOCK_D": 32}
"""In Triton's interpreter."""
SPAN_NATS = 64.0
"""How far below its tile's largest a logit is kept, in steps of 1e-3 nats; e^-64 is nothing beside 1."""


class Kept(NamedTuple):
    """A block's logits between its sums and its dz, which takes their place.

    16 bits (for bf16, whose dz has as many): each logit's depth below the largest of its tile, to 5e-4 nats;
    dz is rounded to 2^-9 of itself later. Else float32: h w^T + a b^T, as the library made it.
    """

    z_NV: Tensor
    crest_CN: Tensor | None
    """Of each tile of `per_crest()` columns, its largest logit; None with float32."""


def keeps_16_bits(logits: Logits) -> bool:
    """Whether 16 bits are enough: the gradient is rounded to bf16, and what lies deeper has no probability.

    Not with a softcap: near it the slope is the small difference of 1 and the square of what was kept.
    """
    return logits.h_ND.dtype == torch.bfloat16 and logits.rule.softcap is None


def per_crest() -> int:
    """Columns that share a crest."""
    return TILE_OF_NUMPY["BLOCK_K"] if kernels().INTERPRETED else min(PART, READ_TILES["sums"][1])


def room_to_keep(logits: Logits, n_rows: int) -> Tensor:
    """Memory for the logits of so many rows."""
    dtype = torch.uint16 if keeps_16_bits(logits) else torch.float32
    return logits.h_ND.new_empty(n_rows * len(logits.w_VD), dtype=dtype)


def kept_in(room: Tensor, n_rows: int, vocabulary: int) -> Kept:
    """Where a block's logits will be."""
    z_NV = room[: n_rows * vocabulary].view(n_rows, vocabulary)
    if room.dtype == torch.float32:
        return Kept(z_NV, None)
    return Kept(z_NV, room.new_empty(-(-vocabulary // per_crest()), n_rows, dtype=torch.float32))


Tiles = Callable[[int], Iterator[tuple[slice, Tensor]]]
"""(multiple) -> columns, each beginning at a multiple of it, with their h w^T + a b^T in float32, [N, K]."""


def launch_sums(made: Ready, asks: Asks, tiles: Tiles | None, kept: Kept | None = None) -> Sums:
    """The sums of all rows: of logits that come in `tiles`, or that the kernel makes in registers.

    `tiles` that are read may be kept in 16 bits.
    """
    h_ND = made.logits.h_ND
    n_rows, vocabulary = len(h_ND), len(made.logits.w_VD)
    whole = slice(0, vocabulary)
    n_top = min(asks.top, vocabulary)
    n_slots = power_of_2(n_top, 1)
    part = max(PART, TOKENS_PER_SLOT * n_slots) if n_top else PART
    n_parts = -(-vocabulary // part)
    pick_P = h_ND.new_zeros(len(made.token_P), dtype=torch.float32)
    sums_FSN = h_ND.new_empty(kernels().N_SUMS, n_parts, n_rows, dtype=torch.float32)
    counts_FSN = h_ND.new_empty(kernels().N_COUNTS, n_parts, n_rows, dtype=torch.int32)
    list_SNK = h_ND.new_empty(n_parts, n_rows, n_top, dtype=torch.float32)
    token_SNK = h_ND.new_empty(n_parts, n_rows, n_top, dtype=torch.int32)
    if n_rows:
        at_once = min(n_rows, LIST_ELEMENTS // n_slots)
        kernel, blocks = _choice("sums", at_once, is_read=tiles is not None)
        crest_CN = None if kept is None else kept.crest_CN
        for columns, y_NK in [(whole, None)] if tiles is None else tiles(part):
            n_columns = columns.stop - columns.start
            programs = functools.partial(_programs, n_rows, -(-n_columns // part))
            kernel[programs](
                **_made_of(made, whole, y_NK),
                threshold_ptr=_contiguous(asks.threshold_N),
                seed_ptr=_contiguous(asks.seed_N),
                pick_ptr=pick_P,
                sum_ptr=sums_FSN,
                count_ptr=counts_FSN,
                list_ptr=list_SNK,
                list_token_ptr=token_SNK,
                kept_ptr=None if kept is None or crest_CN is None else kept.z_NV,
                crest_ptr=crest_CN,
                vocabulary=vocabulary,
                part=part,
                first_part=columns.start // part,
                n_columns=n_columns,
                first_token=asks.first_token,
                per_nat=kernels().DEEPEST / SPAN_NATS,
                ENTROPY=asks.entropy,
                SUM_SQ=asks.sum_sq,
                MEAN=asks.mean_logit,
                N_TOP=n_top,
                BLOCK_T=n_slots,
                **blocks,
            )
    return _merged(asks, pick_P, sums_FSN, counts_FSN, list_SNK, token_SNK)


def _programs(n_rows: int, n_parts: int, meta: dict[str, int]) -> tuple[int]:
    return (-(-n_rows // meta["BLOCK_R"]) * n_parts,)


def _merged(
    asks: Asks, pick_P: Tensor, sums_FSN: Tensor, counts_FSN: Tensor, list_SNK: Tensor, token_SNK: Tensor
) -> Sums:
    """The sums of parts of the vocabulary, made relative to the largest logit of all, and added."""
    top_SN, exp_SN, exp_x_SN, exp_sq_SN, z_SN, key_SN = sums_FSN
    count_SN, above_SN, drawn_SN = counts_FSN
    top_N = top_SN.amax(0)
    change_SN = top_SN - top_N
    factor_SN = change_SN.exp()
    top_NK, top_token_NK = _merged_lists(list_SNK, token_SNK) if asks.top else (None, None)
    key_N = drawn_N = None
    if asks.seed_N is not None:
        key_N, part_N = key_SN.max(0)
        drawn_N = drawn_SN.gather(0, part_N[None])[0].long()
    return Sums(
        top_N=top_N,
        exp_N=(factor_SN * exp_SN).sum(0),
        pick_P=pick_P,
        exp_x_N=(factor_SN * (exp_x_SN + change_SN * exp_SN)).sum(0) if asks.entropy else None,
        exp_sq_N=(factor_SN.square() * exp_sq_SN).sum(0) if asks.sum_sq else None,
        z_N=z_SN.sum(0) if asks.mean_logit else None,
        count_N=count_SN.sum(0).float() if asks.mean_logit else None,
        above_N=above_SN.sum(0) if asks.threshold_N is not None else None,
        top_NK=top_NK,
        top_token_NK=top_token_NK,
        drawn_N=drawn_N,
        drawn_key_N=key_N,
    )


def _merged_lists(list_SNK: Tensor, token_SNK: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of all parts' lists, descending; of equal ones the lower token first."""
    n_parts, n_rows, n_top = list_SNK.shape
    z_NJ = list_SNK.transpose(0, 1).reshape(n_rows, n_parts * n_top)
    # A slot that was never filled has a negative token and -inf.
    token_NJ, order_NJ = token_SNK.transpose(0, 1).reshape(z_NJ.shape).long().clamp(min=0).sort(dim=1)
    top_NJ, best_NJ = z_NJ.gather(1, order_NJ).sort(dim=1, descending=True, stable=True)
    return top_NJ[:, :n_top].contiguous(), token_NJ.gather(1, best_NJ[:, :n_top])


def launch_dz(made: Ready, slopes: Slopes, columns: slice, y_NK: Tensor | None) -> Tensor:
    """The gradient of some columns' h w^T + bias: bf16 for bf16 inputs, else float32.

    Of products that are given (h w^T + a b^T of these columns, float32), or that the kernel makes.
    """
    h_ND = made.logits.h_ND
    dz_NK = h_ND.new_empty(len(h_ND), columns.stop - columns.start, dtype=dz_dtype(h_ND.dtype))
    _launch_dz(made, slopes, columns, dz_NK, y_NK)
    return dz_NK


def launch_dz_in_place(made: Ready, slopes: Slopes, kept: Kept) -> Tensor:
    """The same of a block's kept logits, [N, V], where they were."""
    whole = slice(0, len(made.logits.w_VD))
    if kept.crest_CN is None:
        _launch_dz(made, slopes, whole, kept.z_NV, kept.z_NV)
        return kept.z_NV
    dz_NV = kept.z_NV.view(torch.bfloat16)
    _launch_dz(made, slopes, whole, dz_NV, None, kept)
    return dz_NV


def _launch_dz(
    made: Ready, slopes: Slopes, columns: slice, dz_NK: Tensor, y_NK: Tensor | None, kept: Kept | None = None
) -> None:
    n_rows, n_columns = dz_NK.shape
    kernel, blocks = _choice("dz", n_rows, is_read=y_NK is not None or kept is not None)

    def grid(meta: dict[str, int]) -> tuple[int]:
        return (-(-n_rows // meta["BLOCK_R"]) * -(-n_columns // meta["BLOCK_K"]),)

    kernel[grid](
        **_made_of(made, columns, y_NK),
        top_ptr=slopes.top_N.contiguous(),
        slope_a_ptr=slopes.a_N.contiguous(),
        slope_b_ptr=_contiguous(slopes.b_N),
        slope_c_ptr=_contiguous(slopes.c_N),
        slope_d_ptr=_contiguous(slopes.d_N),
        pick_slope_ptr=slopes.pick_P.contiguous(),
        kept_ptr=None if kept is None else kept.z_NV,
        crest_ptr=None if kept is None else kept.crest_CN,
        dz_ptr=dz_NK,
        n_columns=n_columns,
        first_column=columns.start,
        step=SPAN_NATS / kernels().DEEPEST,
        PER_CREST=per_crest(),
        **blocks,
    )


def dz_dtype(dtype: torch.dtype) -> torch.dtype:
    """What dz is rounded to before its products."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def power_of_2(number: int, least: int) -> int:
    """The smallest power of 2 that is not below either."""
    return max(least, 1 << max(0, number - 1).bit_length())


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _choice(name: str, n_rows: int, *, is_read: bool) -> tuple[Any, dict[str, int]]:
    """A kernel and its block sizes, but for those it tunes itself."""
    if kernels().INTERPRETED:
        return getattr(kernels(), f"{name}_kernel"), TILE_OF_NUMPY
    if is_read:
        rows, columns, warps = READ_TILES[name]
        blocks = {"BLOCK_R": rows, "BLOCK_K": min(columns, per_crest()), "BLOCK_D": 16, "num_warps": warps}
        return getattr(kernels(), f"{name}_kernel"), blocks
    return getattr(kernels(), f"tuned_{name}"), {"BLOCK_R": min(128, power_of_2(n_rows, 16))}


def _made_of(made: Ready, columns: slice, y_NK: Tensor | None) -> dict[str, Any]:
    """What every kernel is told about its logits."""
    h_ND, w_VD, bias_V, a_NR, b_VR, _, floor_N = made.logits
    rank = 1 if a_NR is None else a_NR.shape[1]
    return {
        "h_ptr": h_ND,
        "w_ptr": w_VD[columns],
        "a_ptr": a_NR,
        "b_ptr": None if b_VR is None else b_VR[columns],
        "y_ptr": y_NK,
        "bias_ptr": None if bias_V is None else bias_V[columns],
        "floor_ptr": floor_N,
        "pick_start_ptr": made.start_N1,
        "pick_token_ptr": made.token_P,
        "n_rows": len(h_ND),
        "w_stride": w_VD.stride(0),
        "w_step": w_VD.stride(1),
        "y_stride": 0 if y_NK is None else y_NK.stride(0),
        "gain": made.gain,
        "cap": made.cap,
        "WIDTH": h_ND.shape[1],
        "RANK": rank,
        "BLOCK_L": min(64, power_of_2(rank, 16)),
    }
