"""The Triton kernels: sums over logits, and logits turned into their gradient.

A tile of logits is either made here, by a product with float32 accumulation (float32 inputs are multiplied as
float32, not as TF32), or read from memory where the caller has kept it (`y_ptr`). Everything that is done
to a tile is done to the same registers: nothing of size N x V is written by `sums_kernel`.

Triton's launch wants plain pointers, so a kernel has one argument per tensor; None for what is not asked
compiles the code for it away. Rows and columns past the end are read from the last one and not stored. Tiles
are visited in groups of rows, so that a part of w that is in the cache is used by several of them.

Left out: storing logits in 16 bits (log-probabilities would be off by 1e-2).

Shape legend: N rows, a tile is R of them by K tokens of the vocabulary; D a part of the hidden width, L of a
low rank; T slots of a top list; S parts of the vocabulary whose sums are kept apart.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# mypy: ignore-missing-imports
# Kernels are read by Triton's compiler, which has types of its own.

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether TRITON_INTERPRET=1 was set before this was imported: kernels then run on the CPU, in numpy."""
_IN_NUMPY = tl.constexpr(INTERPRETED)
"""numpy has no bf16: its products are made of the same numbers in float32, its rounding of the bits."""

N_SUMS, N_COUNTS = 6, 3
"""How many float32 and int32 numbers `sums_kernel` keeps per row; in this order:"""
TOP, EXP, EXP_X, EXP_SQ, SUM, KEY = (tl.constexpr(index) for index in range(N_SUMS))
COUNT, ABOVE, DRAWN = (tl.constexpr(index) for index in range(N_COUNTS))
LOWEST = tl.constexpr(-3.4028234663852886e38)
INFINITY = tl.constexpr(float("inf"))
GROUP = tl.constexpr(16)
"""Blocks of rows that go through the vocabulary together."""
DEEPEST: int = (1 << 16) - 2
"""Kept logits are depths below a tile's crest, whole numbers of 16 bits up to this; one more: not allowed."""
_DEEPEST, _OUTSIDE = tl.constexpr(DEEPEST), tl.constexpr(DEEPEST + 1)


@triton.jit
def _to_bf16(number):
    """Rounded to the nearest, which Triton's interpreter does not do."""
    if _IN_NUMPY:
        bits = number.to(tl.uint32, bitcast=True)
        bits = tl.where(number == number, bits + 0x7FFF + ((bits >> 16) & 1), bits)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return number.to(tl.bfloat16)


@triton.jit
def _tanh(u):
    """tanh to 1e-7 relative: a polynomial (fitted to tanh(u)/u) below 0.6, where exponentials cancel."""
    s = u * u
    p = 0.021116213609936377 - 0.006276387162284389 * s
    p = 0.13332924005513652 + s * (-0.05387513809931703 + s * p)
    near = u + u * s * (-0.3333333043131926 + s * p)
    e = tl.exp(-2.0 * tl.abs(u))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(s < 0.36, near, tl.where(u < 0, -far, far))


@triton.jit
def _log1p(u):
    """log(1 + u); the rounding of 1 + u is divided out again."""
    v = 1.0 + u
    return tl.where(v == 1.0, u, tl.log(v) * (u / tl.where(v == 1.0, 1.0, v - 1.0)))


@triton.jit
def _mixed(bits):
    """The 32-bit finaliser of `_noise.py`."""
    bits ^= bits >> 16
    bits *= 0x85EBCA6B
    bits ^= bits >> 13
    bits *= 0xC2B2AE35
    return bits ^ (bits >> 16)


@triton.jit
def _gumbel(seed_R, token_K):
    """The noise of `_noise.py` for each row and token, [R, K]."""
    low_R, high_R = (seed_R & 0xFFFFFFFF).to(tl.uint32), ((seed_R >> 32) & 0xFFFFFFFF).to(tl.uint32)
    bits_RK = _mixed((token_K.to(tl.uint32) * 0x9E3779B9)[None, :] ^ low_R[:, None])
    bits_RK = _mixed(bits_RK ^ high_R[:, None])
    u_RK = (bits_RK.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    return -tl.log(-_log1p(-u_RK))


@triton.jit
def _add_product(
    y_RK, left_ptr, right_ptr, row_R, column_K, left_stride, right_stride, right_step, width: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    """y + left[rows] @ right[columns]^T."""
    dtype: tl.constexpr = tl.float32 if _IN_NUMPY else left_ptr.dtype.element_ty
    for start in range(0, width, block):
        place_D = start + tl.arange(0, block)
        left_RD = left_ptr + row_R[:, None].to(tl.int64) * left_stride + place_D[None, :]
        right_DK = right_ptr + column_K[None, :].to(tl.int64) * right_stride + place_D[:, None] * right_step
        if width % block == 0:
            left, right = tl.load(left_RD), tl.load(right_DK)
        else:
            inside_D = place_D < width
            left = tl.load(left_RD, mask=inside_D[None, :], other=0.0)
            right = tl.load(right_DK, mask=inside_D[:, None], other=0.0)
        y_RK = tl.dot(left.to(dtype), right.to(dtype), y_RK, input_precision="ieee")
    return y_RK


@triton.jit
def _logits(
    h_ptr, w_ptr, a_ptr, b_ptr, y_ptr, bias_ptr, row_R, column_K, inside_K, kept_K, n_kept, w_stride, w_step,
    y_stride, gain, cap, WIDTH: tl.constexpr, RANK: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """A tile of logits, -inf where the bias is and past the end; the softcap's slope; what columns are in.

    Products that are read are `n_kept` columns, of which these are `kept_K`: not clamped to what there is but
    masked, or loads would not be known to be contiguous.
    """
    if y_ptr is None:
        y_RK = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
        y_RK = _add_product(y_RK, h_ptr, w_ptr, row_R, column_K, WIDTH, w_stride, w_step, WIDTH, BLOCK_D)
        if a_ptr is not None:
            y_RK = _add_product(y_RK, a_ptr, b_ptr, row_R, column_K, RANK, RANK, 1, RANK, BLOCK_L)
    else:
        kept_RK = y_ptr + row_R[:, None].to(tl.int64) * y_stride + kept_K[None, :]
        y_RK = tl.load(kept_RK, mask=(kept_K < n_kept)[None, :], other=0.0)
    if bias_ptr is not None:
        bias_K = tl.load(bias_ptr + column_K).to(tl.float32)
        inside_K = inside_K & (bias_K != -INFINITY)
        y_RK += tl.where(inside_K, bias_K, 0.0)[None, :]
    z_RK = y_RK * gain
    bend_RK = 1.0
    if cap is not None:
        z_RK = _tanh(z_RK)
        bend_RK = 1.0 - z_RK * z_RK
        z_RK = z_RK * cap
    return tl.where(inside_K[None, :], z_RK, -INFINITY), bend_RK, inside_K


@triton.jit
def _tile(program, n_rows, n_columns, block_rows, block_columns):
    """Which block of rows and which of columns a program has, in groups of rows."""
    n_blocks, n_parts = tl.cdiv(n_rows, block_rows), tl.cdiv(n_columns, block_columns)
    group = program // (GROUP * n_parts)
    n_grouped = tl.minimum(n_blocks - group * GROUP, GROUP)
    place = program - group * GROUP * n_parts
    return group * GROUP + place % n_grouped, place // n_grouped


@triton.jit
def _allowed(z_RK, inside_K, floor_ptr, row_R):
    """Which logits are in the sums; a NaN is, so that it shows."""
    allowed_RK = tl.broadcast_to(inside_K[None, :], z_RK.shape)
    if floor_ptr is not None:
        below_RK = z_RK < tl.load(floor_ptr + row_R)[:, None]
        allowed_RK = allowed_RK & (below_RK == 0)
    return allowed_RK


@triton.jit
def _keep(kept_ptr, crest_ptr, z_RK, allowed_RK, crest_R, own_R, is_row_R, token_K, end, vocabulary, n_rows,
          per_nat, BLOCK_K: tl.constexpr):  # fmt: skip
    """Write a tile of logits as depths below its crest, `per_nat` of them a nat, and the crest."""
    above_R = tl.where(crest_R > -INFINITY, crest_R, 0.0)  # of a tile without any, all are infinitely deep
    depth_RK = (above_R[:, None] - z_RK) * per_nat + 0.5
    depth_RK = tl.where(depth_RK < _DEEPEST, depth_RK, 0.0 + _DEEPEST)
    depth_RK = tl.where(allowed_RK, depth_RK, 0.0 + _OUTSIDE)
    place_RK = own_R[:, None].to(tl.int64) * vocabulary + token_K[None, :]
    inside_RK = is_row_R[:, None] & (token_K < end)[None, :]
    tl.store(kept_ptr + place_RK, depth_RK.to(tl.uint16), mask=inside_RK)
    tile = tl.min(token_K, axis=0) // BLOCK_K
    tl.store(crest_ptr + tile.to(tl.int64) * n_rows + own_R, crest_R, mask=is_row_R)


@triton.jit
def _kept(kept_ptr, crest_ptr, row_R, own_K, n_columns, n_rows, step, PER_CREST: tl.constexpr):
    """What `_keep` wrote: logits, and which are allowed. A tile has one crest."""
    place_RK = kept_ptr + row_R[:, None].to(tl.int64) * n_columns + own_K[None, :]
    depth_RK = tl.load(place_RK, mask=(own_K < n_columns)[None, :], other=_OUTSIDE).to(tl.int32)
    tile = tl.min(own_K, axis=0) // PER_CREST
    crest_R = tl.load(crest_ptr + tile.to(tl.int64) * n_rows + row_R)
    return crest_R[:, None] - depth_RK.to(tl.float32) * step, depth_RK != _OUTSIDE


@triton.jit
def _best(z_RK):
    """The largest of each row and its column, the first of equal ones."""
    return tl.max(z_RK, axis=1, return_indices=True, return_indices_tie_break_left=True)


@triton.jit
def _insert(best_R, token_R, list_RT, list_token_RT):
    """Put a logit into each row's list where it is larger than the list's smallest.

    Of equal smallest ones the highest token leaves; tokens come in ascending order.
    """
    worst_R = tl.min(list_RT, axis=1)
    is_worst_RT = list_RT == worst_R[:, None]
    leaving_R = tl.max(tl.where(is_worst_RT, list_token_RT, -2147483648), axis=1)
    leaves_RT = is_worst_RT & (list_token_RT == leaving_R[:, None]) & (best_R > worst_R)[:, None]
    list_RT = tl.where(leaves_RT, best_R[:, None], list_RT)
    return list_RT, tl.where(leaves_RT, token_R[:, None], list_token_RT)


@triton.jit(do_not_specialize=["n_rows", "first_token", "first_part"])
def sums_kernel(
    h_ptr, w_ptr, a_ptr, b_ptr, y_ptr, bias_ptr, floor_ptr, threshold_ptr, seed_ptr,
    pick_start_ptr, pick_token_ptr, pick_ptr, sum_ptr, count_ptr, list_ptr, list_token_ptr, kept_ptr,
    crest_ptr, n_rows, vocabulary, part, first_part, n_columns, first_token, w_stride, w_step, y_stride, gain,
    cap, per_nat, ENTROPY: tl.constexpr, SUM_SQ: tl.constexpr, MEAN: tl.constexpr, N_TOP: tl.constexpr,
    WIDTH: tl.constexpr, RANK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sums of a block of rows over one part of the vocabulary: [N_SUMS, S, N], [N_COUNTS, S, N]; picks.

    With `kept_ptr` logits are kept in 16 bits, [N, V], and each tile's largest, [V / BLOCK_K, N]. A launch
    goes through `n_columns` of the vocabulary, from the part `first_part` on.
    """
    block, split = _tile(tl.program_id(0), n_rows, n_columns, BLOCK_R, part)
    split += first_part
    own_R = block * BLOCK_R + tl.arange(0, BLOCK_R)
    is_row_R = own_R < n_rows
    row_R = tl.minimum(own_R, n_rows - 1)
    first_pick_R = tl.load(pick_start_ptr + row_R)
    n_picks_R = tl.where(is_row_R, tl.load(pick_start_ptr + row_R + 1) - first_pick_R, 0)
    n_picks = tl.max(n_picks_R, axis=0)

    top_R = tl.full((BLOCK_R,), LOWEST, tl.float32)
    exp_R = tl.zeros((BLOCK_R,), tl.float32)
    exp_x_R = tl.zeros((BLOCK_R,), tl.float32)
    exp_sq_R = tl.zeros((BLOCK_R,), tl.float32)
    sum_R = tl.zeros((BLOCK_R,), tl.float32)
    key_R = tl.full((BLOCK_R,), -INFINITY, tl.float32)
    drawn_R = tl.zeros((BLOCK_R,), tl.int32)
    count_R = tl.zeros((BLOCK_R,), tl.int32)
    above_R = tl.zeros((BLOCK_R,), tl.int32)
    slot_T = tl.arange(0, BLOCK_T)
    list_RT = tl.zeros((BLOCK_R, BLOCK_T), tl.float32)
    list_RT += tl.where(slot_T < N_TOP, -INFINITY, INFINITY)[None, :]
    list_token_RT = tl.zeros((BLOCK_R, BLOCK_T), tl.int32) - 1 - slot_T[None, :]

    end = tl.minimum((split + 1) * part, vocabulary)
    for start in range(split * part, end, BLOCK_K):
        token_K = start + tl.arange(0, BLOCK_K)
        column_K = tl.minimum(token_K, vocabulary - 1)
        z_RK, _, inside_K = _logits(
            h_ptr, w_ptr, a_ptr, b_ptr, y_ptr, bias_ptr, row_R, column_K, token_K < end,
            token_K - first_part * part, n_columns, w_stride, w_step, y_stride, gain, cap, WIDTH, RANK,
            BLOCK_R, BLOCK_K, BLOCK_D, BLOCK_L,
        )  # fmt: skip
        for slot in range(n_picks):
            pick_R = first_pick_R + slot
            picked_R = tl.load(pick_token_ptr + pick_R, mask=slot < n_picks_R, other=-1)
            if tl.max(((picked_R >= start) & (picked_R < start + BLOCK_K)).to(tl.int32), axis=0) > 0:
                is_pick_RK = (picked_R[:, None] == token_K[None, :]) & (token_K < end)[None, :]
                picked_z_R = tl.sum(tl.where(is_pick_RK, z_RK, 0.0), axis=1)
                is_here_R = (picked_R >= start) & (picked_R < tl.minimum(start + BLOCK_K, end))
                tl.store(pick_ptr + pick_R, picked_z_R, mask=is_here_R)

        allowed_RK = _allowed(z_RK, inside_K, floor_ptr, row_R)
        in_z_RK = tl.where(allowed_RK, z_RK, -INFINITY)
        if N_TOP > 0:
            rest_RK = in_z_RK
            best_R, at_R = _best(rest_RK)
            while tl.max((best_R > tl.min(list_RT, axis=1)).to(tl.int32), axis=0) > 0:
                list_RT, list_token_RT = _insert(best_R, start + at_R, list_RT, list_token_RT)
                rest_RK = tl.where(token_K[None, :] == (start + at_R)[:, None], -INFINITY, rest_RK)
                best_R, at_R = _best(rest_RK)

        crest_R = tl.max(in_z_RK, axis=1)
        if kept_ptr is not None:
            _keep(
                kept_ptr, crest_ptr, z_RK, allowed_RK, crest_R, own_R, is_row_R, token_K, end, vocabulary,
                n_rows, per_nat, BLOCK_K,
            )  # fmt: skip
        new_top_R = tl.maximum(top_R, crest_R)
        change_R = top_R - new_top_R
        factor_R = tl.exp(change_R)
        x_RK = tl.where(allowed_RK, z_RK - new_top_R[:, None], 0.0)
        exp_RK = tl.where(allowed_RK, tl.exp(x_RK), 0.0)
        if ENTROPY:
            exp_x_R = factor_R * (exp_x_R + change_R * exp_R) + tl.sum(exp_RK * x_RK, axis=1)
        if SUM_SQ:
            exp_sq_R = factor_R * factor_R * exp_sq_R + tl.sum(exp_RK * exp_RK, axis=1)
        exp_R = factor_R * exp_R + tl.sum(exp_RK, axis=1)
        top_R = new_top_R
        if MEAN:
            sum_R += tl.sum(tl.where(allowed_RK, z_RK, 0.0), axis=1)
            count_R += tl.sum(allowed_RK.to(tl.int32), axis=1)
        if threshold_ptr is not None:
            above_R += tl.sum((in_z_RK > tl.load(threshold_ptr + row_R)[:, None]).to(tl.int32), axis=1)
        if seed_ptr is not None:
            noise_RK = _gumbel(tl.load(seed_ptr + row_R), token_K + first_token)
            best_key_R, at_key_R = _best(in_z_RK + noise_RK)
            drawn_R = tl.where(best_key_R > key_R, start + at_key_R, drawn_R)
            key_R = tl.maximum(best_key_R, key_R)

    n_parts = tl.cdiv(vocabulary, part)
    field = (n_parts * n_rows).to(tl.int64)
    place_R = split.to(tl.int64) * n_rows + own_R
    tl.store(sum_ptr + TOP * field + place_R, top_R, mask=is_row_R)
    tl.store(sum_ptr + EXP * field + place_R, exp_R, mask=is_row_R)
    if ENTROPY:
        tl.store(sum_ptr + EXP_X * field + place_R, exp_x_R, mask=is_row_R)
    if SUM_SQ:
        tl.store(sum_ptr + EXP_SQ * field + place_R, exp_sq_R, mask=is_row_R)
    if MEAN:
        tl.store(sum_ptr + SUM * field + place_R, sum_R, mask=is_row_R)
        tl.store(count_ptr + COUNT * field + place_R, count_R, mask=is_row_R)
    if threshold_ptr is not None:
        tl.store(count_ptr + ABOVE * field + place_R, above_R, mask=is_row_R)
    if seed_ptr is not None:
        tl.store(sum_ptr + KEY * field + place_R, key_R, mask=is_row_R)
        tl.store(count_ptr + DRAWN * field + place_R, drawn_R, mask=is_row_R)
    if N_TOP > 0:
        place_RT = place_R[:, None] * N_TOP + slot_T[None, :]
        is_slot_RT = is_row_R[:, None] & (slot_T < N_TOP)[None, :]
        tl.store(list_ptr + place_RT, list_RT, mask=is_slot_RT)
        tl.store(list_token_ptr + place_RT, list_token_RT, mask=is_slot_RT)


@triton.jit(do_not_specialize=["n_rows", "first_column"])
def dz_kernel(
    h_ptr, w_ptr, a_ptr, b_ptr, y_ptr, bias_ptr, floor_ptr, top_ptr, slope_a_ptr, slope_b_ptr, slope_c_ptr,
    slope_d_ptr, pick_start_ptr, pick_token_ptr, pick_slope_ptr, kept_ptr, crest_ptr, dz_ptr, n_rows,
    n_columns, first_column, w_stride, w_step, y_stride, gain, cap, step, WIDTH: tl.constexpr,
    RANK: tl.constexpr, PER_CREST: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dz of one tile, [rows, columns]; pointers are to the first row and column, tokens of picks are not.

    Kept logits, or products that were kept, may lie where dz is written: a tile is read before it is written.
    """
    block, part = _tile(tl.program_id(0), n_rows, n_columns, BLOCK_R, BLOCK_K)
    own_R = block * BLOCK_R + tl.arange(0, BLOCK_R)
    own_K = part * BLOCK_K + tl.arange(0, BLOCK_K)
    is_row_R, is_column_K = own_R < n_rows, own_K < n_columns
    row_R, column_K = tl.minimum(own_R, n_rows - 1), tl.minimum(own_K, n_columns - 1)
    if kept_ptr is not None:
        z_RK, allowed_RK = _kept(kept_ptr, crest_ptr, row_R, own_K, n_columns, n_rows, step, PER_CREST)
        bend_RK = 1.0
    else:
        z_RK, bend_RK, inside_K = _logits(
            h_ptr, w_ptr, a_ptr, b_ptr, y_ptr, bias_ptr, row_R, column_K, is_column_K, own_K, n_columns,
            w_stride, w_step, y_stride, gain, cap, WIDTH, RANK, BLOCK_R, BLOCK_K, BLOCK_D, BLOCK_L,
        )  # fmt: skip
        allowed_RK = _allowed(z_RK, inside_K, floor_ptr, row_R)
    x_RK = tl.where(allowed_RK, z_RK - tl.load(top_ptr + row_R)[:, None], 0.0)
    exp_RK = tl.exp(x_RK)
    inner_RK = tl.zeros((BLOCK_R, BLOCK_K), tl.float32) + tl.load(slope_a_ptr + row_R)[:, None]
    if slope_b_ptr is not None:
        inner_RK += tl.load(slope_b_ptr + row_R)[:, None] * x_RK
    if slope_c_ptr is not None:
        inner_RK += tl.load(slope_c_ptr + row_R)[:, None] * exp_RK
    dz_RK = exp_RK * inner_RK
    if slope_d_ptr is not None:
        dz_RK += tl.load(slope_d_ptr + row_R)[:, None]

    first_pick_R = tl.load(pick_start_ptr + row_R)
    n_picks_R = tl.load(pick_start_ptr + row_R + 1) - first_pick_R
    token_K = first_column + own_K
    start = first_column + part * BLOCK_K
    for slot in range(tl.max(n_picks_R, axis=0)):
        has_R = slot < n_picks_R
        picked_R = tl.load(pick_token_ptr + first_pick_R + slot, mask=has_R, other=-1)
        if tl.max(((picked_R >= start) & (picked_R < start + BLOCK_K)).to(tl.int32), axis=0) > 0:
            slope_R = tl.load(pick_slope_ptr + first_pick_R + slot, mask=has_R, other=0.0)
            dz_RK += tl.where(picked_R[:, None] == token_K[None, :], slope_R[:, None], 0.0)
    dz_RK = tl.where(allowed_RK, dz_RK * bend_RK, 0.0)
    place_RK = own_R[:, None].to(tl.int64) * n_columns + own_K[None, :]
    inside_RK = is_row_R[:, None] & is_column_K[None, :]
    if dz_ptr.dtype.element_ty == tl.bfloat16:
        tl.store(dz_ptr + place_RK, _to_bf16(dz_RK), mask=inside_RK)
    else:
        tl.store(dz_ptr + place_RK, dz_RK, mask=inside_RK)


def _tiles(*sizes: tuple[int, int, int, int]) -> list[triton.Config]:
    """Configurations to try: columns and depth of a tile, warps, stages of the pipeline."""
    return [
        triton.Config({"BLOCK_K": columns, "BLOCK_D": depth}, num_warps=warps, num_stages=stages)
        for columns, depth, warps, stages in sizes
    ]


_PRODUCT_TILES = _tiles(
    (256, 64, 8, 3), (256, 64, 8, 4), (128, 64, 4, 4), (128, 64, 8, 3), (128, 32, 4, 4), (64, 128, 4, 3),
    (64, 64, 4, 4), (64, 32, 4, 2),
)  # fmt: skip


def _worth_compiling(configs, arguments, **_):
    """Of float32 the shallow tiles: its products are unrolled, a deep one takes ten seconds to compile."""
    is_wide = arguments["h_ptr"].dtype.itemsize > 2
    return [config for config in configs if config.kwargs["BLOCK_D"] == 32] if is_wide else configs


_tuned = triton.autotune(
    _PRODUCT_TILES,
    key=["WIDTH", "RANK", "BLOCK_R"],
    prune_configs_by={"early_config_prune": _worth_compiling},
    cache_results=True,
)
tuned_sums, tuned_dz = _tuned(sums_kernel), _tuned(dz_kernel)
"""Which tiles are fastest depends on the chip: the first call tries them and remembers, on disk too, so that
sums are added in the same order in the next run on this machine."""
