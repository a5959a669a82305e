"""Second derivatives through the head: the gradient of a gradient, by tiles, never [N, V].

Let L = sum_o g_o . o over the outputs o, with o's gradient g_o. The pass back answers the gradients of L.
Whoever differentiates these, with cotangents u_h, u_w, u_bias, u_a, u_b, wants the derivatives of

    phi = <u_h, dL/dh> + <u_w, dL/dw> + <u_bias, dL/dbias> + <u_a, dL/da> + <u_b, dL/db>

which is the slope of L along (u_h, u_w, ...), or sum_o g_o . o', where a dash is a derivative along that
direction. With y = h w^T + a b^T + bias, z = softcap * tanh(y * scale / softcap) / temperature, x = log p,

    y' = u_h w^T + h u_w^T + u_a b^T + a u_b^T + u_bias        z' = (dz/dy) y'        m = sum p z'
    dphi/dg_o = o':   lse' = m   (log p_pick)' = z'_pick - m   (mean z)' = sum z' / n
                      H' = -(sum p x z' + m H)   (sum p^2)' = 2 (sum p^2 z' - m sum p^2)
    dphi/dy' = dL/dy
    dphi/dy  = (dz/dy) p ((z' - m)(a + b x + 2 c p + b) + a') + (d^2z/dy^2) y' dL/dz
    dphi/dh  = (dphi/dy) w + (dphi/dy') u_w      dphi/dw = (dphi/dy)^T h + (dphi/dy')^T u_h      ...

where a, b and c are those of `_engine.py`, and a' = -g_H H' - 2 g_S (sum p^2)'. One pass over the tiles takes
the sums, another the gradients: ten products of the head's size where a first derivative takes three.

It is always computed here, whichever backend made the answers and the gradients: `scale` has all it reads of
them, and backends agree on it up to rounding. A head that is cut over ranks gives its sum over ranks as
`total`. The support of top-k and top-p is held fixed, as it is in the first derivative. Left out: third
derivatives (refused by `_ops.py`), and the bitwise guarantee of the invariant mode.

Shape legend: N counted tokens, D hidden width, V vocabulary, R rank of a low-rank addition, P picks, J picks
of one row, K tokens of a top list; a tile is R tokens by K vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gyrocompass.loss._chunked import _to_gradient, _Totals
from gyrocompass.loss._engine import Question, Scale, slopes
from gyrocompass.loss._products import products_for
from gyrocompass.loss._question import Gradients, LogitRule, Logits, Needs, Slopes
from gyrocompass.loss._tiles import Tile, Tiles, like_tile
from gyrocompass.loss.signal import TokenLogProbs


class Second(NamedTuple):
    """The derivatives of phi."""

    gradients: Gradients
    """Of h, w, bias, a and b."""
    tangents: TokenLogProbs
    """Of the outputs' gradients: each output's derivative along the direction. None where `gradient` is."""


def second(
    question: Question,
    scale: Scale,
    gradient: TokenLogProbs,
    along: Gradients,
    needs: Needs,
    total: Callable[[Tensor], Tensor] = lambda share: share,
) -> Second:
    """Differentiate the pass back.

    Args:
        question: what was asked, its counted rows only.
        scale: what the pass forward found.
        gradient: g_o of each output, N rows.
        along: u_h, u_w, u_bias, u_a and u_b; None for zeros.
        needs: which of the gradients are wanted.
        total: the sum over the parts of the vocabulary.

    Returns:
        The derivatives of phi, gradients in the dtypes of their inputs.
    """
    picks = question.picks(None if gradient.top_TK is None else scale.top_token_NK)
    tiles = Tiles(question.logits, picks)
    direction = _Direction(tiles, along)
    moments = _moments(tiles, direction, scale, gradient)
    moments = _Moments(*(None if share is None else total(share) for share in moments))  # type: ignore[arg-type]
    tangents = _tangents(question, scale, gradient, moments)
    rule = question.logits.rule
    bends = _Bends(
        slopes(question, scale, gradient),
        moments.mean_N,
        _constant(scale, gradient, tangents) * (rule.logit_scale / rule.temperature) / scale.exp_N,
    )
    found = _gradients(tiles, direction, bends, needs)
    found = found._replace(
        dh_ND=None if found.dh_ND is None else total(found.dh_ND),
        da_NR=None if found.da_NR is None else total(found.da_NR),
    )
    return Second(found, tangents)


class _Pair:
    """One of the products in y, left right^T, and its derivative u_left right^T + left u_right^T:
    one product, [u_left left] [right u_right]^T, without the columns of what has no u."""

    def __init__(
        self, left_NW: Tensor, right_VW: Tensor, u_left: Tensor | None, u_right: Tensor | None, tiles: Tiles
    ) -> None:
        self.u_left, self.u_right, width = u_left, u_right, left_NW.shape[1]
        self.u_left_first, self.u_right_last = slice(0, width), slice(0, width)
        if u_left is None and u_right is not None:
            sides = Logits(left_NW, u_right, None, None, None, LogitRule())
        elif u_left is not None and u_right is not None:
            sides = Logits(u_left, right_VW, None, left_NW, u_right, LogitRule())
            self.u_right_last = slice(width, 2 * width)
        elif u_left is not None:
            sides = Logits(u_left, right_VW, None, None, None, LogitRule())
        if tiles.dtype == torch.float64:
            sides = sides._replace(h_ND=sides.h_ND.double())
        self.products = products_for(sides, (tiles.n_rows_tile, tiles.n_columns_tile))

    def add_gradients(
        self, q_RK: Tensor, rows: slice, left_RW: Tensor | None, right_KW: Tensor | None
    ) -> None:
        """left += q u_right and right += q^T u_left, where they are wanted."""
        if self.u_right is not None and left_RW is not None:
            self.products.add_dh(q_RK, self.u_right_last, left_RW)
        if self.u_left is not None and right_KW is not None:
            self.products.add_dw(q_RK, rows, self.u_left_first, right_KW)


class _Direction:
    """y' by tile, and what the gradient of y' gives to those of h, w, a and b."""

    def __init__(self, tiles: Tiles, along: Gradients) -> None:
        h_ND, w_VD, _, a_NR, b_VR = tiles.logits[:5]
        self.tiles, self.u_bias_V = tiles, along.dbias_V
        self.head = self.low_rank = None
        if along.dh_ND is not None or along.dw_VD is not None:
            self.head = _Pair(h_ND, w_VD, along.dh_ND, along.dw_VD, tiles)
        if a_NR is not None and b_VR is not None and (along.da_NR is not None or along.db_VR is not None):
            self.low_rank = _Pair(a_NR, b_VR, along.da_NR, along.db_VR, tiles)
        self._buffer, self._spare = tiles.spare(), tiles.spare()

    def enter(self, columns: slice) -> None:
        """Prepare a part of the vocabulary."""
        for pair in (self.head, self.low_rank):
            if pair is not None:
                pair.products.enter(columns)

    def of(self, tile: Tile) -> Tensor:
        """y' of a tile; overwritten by the next."""
        y_RK = like_tile(self._buffer, tile.rows, tile.columns).zero_()
        for pair in (self.head, self.low_rank):
            if pair is not None:
                share_RK = like_tile(self._spare, tile.rows, tile.columns)
                pair.products.logits(tile.rows, share_RK)
                y_RK += share_RK
        return y_RK if self.u_bias_V is None else y_RK.add_(self.u_bias_V[tile.columns])

    def add_gradients(self, q_RK: Tensor, tile: Tile, totals: _Totals, sum_KW: Tensor) -> None:
        """The share of q = dphi/dy'."""
        sum_RW, needs = totals.dh_NW[tile.rows], totals.needs
        if self.head is not None:
            width = self.tiles.logits.w_VD.shape[1]
            left, right = (side[:, :width] for side in (sum_RW, sum_KW))
            self.head.add_gradients(q_RK, tile.rows, left if needs.h else None, right if needs.w else None)
        if self.low_rank is not None and needs.low_rank and self.tiles.logits.b_VR is not None:
            rank = self.tiles.logits.b_VR.shape[1]
            left, right = (side[:, side.shape[1] - rank :] for side in (sum_RW, sum_KW))
            self.low_rank.add_gradients(q_RK, tile.rows, left, right)


class _At(NamedTuple):
    """What both passes need at a tile; 0 where a token is not allowed."""

    x_RK: Tensor
    """z - top."""
    exp_RK: Tensor
    dash_RK: Tensor
    """z'."""
    y_dash_RK: Tensor
    bent_RK: Tensor | None
    """tanh of the softcap; None without one."""


def _at(tiles: Tiles, tile: Tile, direction: _Direction, top_N: Tensor) -> _At:
    """Logits, now relative to their top, and their derivative."""
    softcap, logit_scale, temperature = tiles.logits.rule
    banned = tile.not_allowed(tiles.logits.floor_N)
    y_dash_RK, bent_RK = direction.of(tile), None
    dash_RK = y_dash_RK * (logit_scale / temperature)
    if softcap is not None:
        bent_RK = tile.z_RK * (temperature / softcap)
        dash_RK.mul_(1.0 - bent_RK.square())
    x_RK = tile.z_RK.sub_(top_N[tile.rows, None])
    exp_RK = x_RK.exp()
    if banned is not None:
        for part in (x_RK, exp_RK, dash_RK, y_dash_RK, *(() if bent_RK is None else (bent_RK,))):
            part.masked_fill_(banned, 0.0)
    return _At(x_RK, exp_RK, dash_RK, y_dash_RK, bent_RK)


class _Moments(NamedTuple):
    """Sums over the allowed tokens."""

    mean_N: Tensor
    """m = sum p z'."""
    log_p_N: Tensor | None
    """sum p x z', where the entropy has a gradient."""
    sq_N: Tensor | None
    """sum p^2 z', where sum p^2 has one."""
    plain_N: Tensor | None
    """sum z', where the mean logit has one."""
    pick_P: Tensor
    """z' of the picks; 0 where they are not here or not allowed."""


def _moments(tiles: Tiles, direction: _Direction, scale: Scale, gradient: TokenLogProbs) -> _Moments:
    """One pass over the tiles."""
    mean_N, exp_N = torch.zeros_like(scale.exp_N), scale.exp_N
    log_p_N = None if gradient.entropy_T is None else torch.zeros_like(exp_N)
    sq_N = None if gradient.sum_sq_T is None else torch.zeros_like(exp_N)
    plain_N = None if gradient.mean_logit_T is None else torch.zeros_like(exp_N)
    pick_P = exp_N.new_zeros(tiles.n_picks)
    for columns in tiles.columns:
        direction.enter(columns)
        for tile in tiles.across(columns):
            at, rows = _at(tiles, tile, direction, scale.top_N), tile.rows
            pick_P[tiles.picks.asked_Q[tile.picks]] = at.dash_RK[tiles.picks.within(tile)]
            if plain_N is not None:
                plain_N[rows] += at.dash_RK.sum(dim=1)
            weighted_RK = at.dash_RK.mul_(at.exp_RK)
            mean_N[rows] += weighted_RK.sum(dim=1)
            if sq_N is not None:
                sq_N[rows] += torch.einsum("rk,rk->r", weighted_RK, at.exp_RK)
            if log_p_N is not None:
                log_p_N[rows] += weighted_RK.mul_(at.x_RK).sum(dim=1)
    mean_N /= exp_N
    return _Moments(
        mean_N,
        None if log_p_N is None else log_p_N / exp_N - exp_N.log() * mean_N,
        None if sq_N is None else sq_N / exp_N.square(),
        plain_N,
        pick_P,
    )


def _tangents(question: Question, scale: Scale, gradient: TokenLogProbs, moments: _Moments) -> TokenLogProbs:
    """Each output's derivative along the direction."""
    mean_N, candidate_NC = moments.mean_N, question.candidate_NC
    entropy_N = mean_logit_N = sum_sq_N = tangent_NC = None
    n_candidates = 0 if candidate_NC is None else candidate_NC.shape[1]
    n_top = 0 if gradient.top_TK is None else gradient.top_TK.shape[1]
    pick_NJ = moments.pick_P.view(len(mean_N), 1 + n_candidates + n_top) - mean_N[:, None]
    if candidate_NC is not None:
        tangent_NC = pick_NJ[:, 1 : 1 + n_candidates].masked_fill(candidate_NC < 0, 0.0)
    if moments.log_p_N is not None and scale.entropy_N is not None:
        entropy_N = -(moments.log_p_N + mean_N * scale.entropy_N)
    if moments.sq_N is not None and scale.sum_sq_N is not None:
        sum_sq_N = 2 * (moments.sq_N - mean_N * scale.sum_sq_N)
    if moments.plain_N is not None and scale.count_N is not None:
        mean_logit_N = moments.plain_N / scale.count_N
    return TokenLogProbs(
        logprob_T=pick_NJ[:, 0].clone(),
        lse_T=mean_N,
        entropy_T=entropy_N,
        mean_logit_T=mean_logit_N,
        sum_sq_T=sum_sq_N,
        candidate_TC=tangent_NC,
        top_TK=pick_NJ[:, 1 + n_candidates :].clone() if n_top else None,
    )


def _constant(scale: Scale, gradient: TokenLogProbs, tangents: TokenLogProbs) -> Tensor:
    """a', [N]."""
    constant_N = torch.zeros_like(scale.exp_N)
    if gradient.entropy_T is not None and tangents.entropy_T is not None:
        constant_N = constant_N - gradient.entropy_T * tangents.entropy_T
    if gradient.sum_sq_T is not None and tangents.sum_sq_T is not None:
        constant_N = constant_N - 2 * gradient.sum_sq_T * tangents.sum_sq_T
    return constant_N


class _Bends(NamedTuple):
    """What a row's tiles need for dphi/dy."""

    slopes: Slopes
    mean_N: Tensor
    """m."""
    constant_N: Tensor
    """a', times what the slopes' a is times of a."""


def _gradients(tiles: Tiles, direction: _Direction, bends: _Bends, needs: Needs) -> Gradients:
    """The other pass, each part of the vocabulary finished before the next."""
    totals, spare, room = _Totals(tiles.logits, needs, in_parts=True), tiles.spare(), tiles.spare()
    for columns in tiles.columns:
        direction.enter(columns)
        sum_KW = totals._part(columns)
        for tile in tiles.across(columns):
            copy_RK = like_tile(room, tile.rows, tile.columns).copy_(tile.z_RK)
            q_RK = _to_gradient(tiles, tile._replace(z_RK=copy_RK), bends.slopes, spare)
            direction.add_gradients(q_RK, tile, totals, sum_KW)
            g_RK = _bent_gradient(tiles, tile, direction, bends, q_RK)
            if totals.left.stop > totals.left.start:
                tiles.products.add_dh(g_RK, totals.left, totals.dh_NW[tile.rows])
            if totals.right.stop > totals.right.start:
                tiles.products.add_dw(g_RK, tile.rows, totals.right, sum_KW)
            if totals.dbias_V is not None:
                totals.dbias_V[columns] += g_RK.sum(dim=0)
        totals._finish(columns, sum_KW)
    return totals.rounded()


def _bent_gradient(tiles: Tiles, tile: Tile, direction: _Direction, bends: _Bends, q_RK: Tensor) -> Tensor:
    """dphi/dy of a tile, given q = dphi/dy'."""
    (top_N, a_N, b_N, c_N, _, _), rows, rule = bends.slopes, tile.rows, tiles.logits.rule
    at = _at(tiles, tile, direction, top_N)
    curve_RK: Tensor = a_N[rows, None]
    if b_N is not None:
        curve_RK = torch.addcmul(curve_RK + b_N[rows, None], at.x_RK, b_N[rows, None])
    if c_N is not None:
        curve_RK = torch.addcmul(curve_RK, at.exp_RK, c_N[rows, None], value=2.0)
    g_RK = at.dash_RK.sub_(bends.mean_N[rows, None]).mul_(curve_RK).add_(bends.constant_N[rows, None])
    g_RK.mul_(at.exp_RK)
    if at.bent_RK is not None and rule.softcap is not None:
        g_RK.mul_(1.0 - at.bent_RK.square())
        bend_RK = at.bent_RK.mul_(q_RK).mul_(at.y_dash_RK)
        g_RK.add_(bend_RK, alpha=-2.0 * rule.logit_scale / rule.softcap)
    return g_RK
