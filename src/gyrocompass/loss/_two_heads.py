"""Divergences of two heads by tiles that lie side by side: a term of each token, and its two rates.

Each divergence is a sum over tokens of a term F(p, q), and each F here has degree one (it doubles when p and
q do), so that F is the sum of its two rates:

    F = G + G'      G = dF/d(log p)      G' = dF/d(log q)

    forward_kl        G = p - q                       G' = q log(q / p)
    reverse_kl        G = p log(p / q)                G' = q - p
    jsd               G = (1 - beta) p log(p / M)     G' = beta q log(q / M)
    total_variation   G = p sign(p - q) / 2           G' = q sign(q - p) / 2

(p - q sums to 0 in the KL divergences. With it no term is negative, and a small error of a normaliser cancels
to first order: heads that nearly agree have a divergence with correct digits.) The gradient of each head's
logits is made of its own rates alone, dF/dz_v = G_v - p_v sum_u G_u.

Pass one takes both heads' normalisers, each by the fastest backend for it. Pass two makes tiles of both
heads' logits and sums terms and rates; the pass back makes the tiles once more and turns them into gradients.
Between products a tile is worked off in pieces that stay in a core's cache. That makes 4 products of a head's
size forward, and 2 backward, and 2 for each head that wants gradients. (To keep some rows' logits of both
heads would save 2 of them, for smaller products.)

Heads that are cut over ranks are cut at the same tokens: normalisers, terms and rates are sums over ranks,
and so are the gradients of hidden states.

Shape legend: N counted positions, D hidden width (of each head its own), V vocabulary; a tile is R rows by K
vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from gyrocompass.loss._backends import backend_for
from gyrocompass.loss._chunked import _Totals
from gyrocompass.loss._question import Asks, Backend, Gradients, LogitRule, Logits, Needs, Picks
from gyrocompass.loss._sharded import Sharded, over_ranks, with_totals
from gyrocompass.loss._tiles import Tiles
from gyrocompass.loss.signal import Kind

KINDS: tuple[Kind, ...] = get_args(Kind)


PIECE_ELEMENTS = 1 << 16
"""How much of a tile is worked off at a time: 256 kB in float32."""


class Measure(NamedTuple):
    """Which divergence."""

    kind: Kind
    beta: float

    def rates(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """G and G' of each outcome; 0 for a probability of 0, except that a KL divergence may be infinite."""
        p, q, gap = log_p.exp(), log_q.exp(), log_q - log_p
        if self.kind == "total_variation":
            sign = (p - q).sign_().mul_(0.5)
            return p.mul_(sign), q.mul_(sign.neg_())
        if self.kind == "jsd":
            to_p, to_q = _log_mixture(gap, self.beta)
            return _product(p, to_p).mul_(self.beta - 1.0), _product(q, to_q).mul_(-self.beta)
        less = _product(torch.maximum(p, q), gap.abs().neg_().expm1_().mul_(gap.sign()))  # p - q
        if self.kind == "forward_kl":
            return less, _product(q, gap)
        return _product(p, gap.neg_()), less.neg_()


def _product(weight: Tensor, log_ratio: Tensor) -> Tensor:
    """weight * log_ratio, in the place of log_ratio; 0 where the weight is, whatever the ratio."""
    return log_ratio.mul_(weight).masked_fill_(weight == 0, 0.0)


def _log_mixture(gap: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """log(M / p) and log(M / q) of gap = log(q / p): good for small gaps and for large ones."""
    share = (gap > 0).to(gap.dtype).mul_(1.0 - 2.0 * beta).add_(beta)
    above = gap.abs().neg_().expm1_().mul_(share).log1p_()
    return gap.clamp(min=0.0).add_(above), gap.neg().clamp_(min=0.0).add_(above)


class _Side(NamedTuple):
    """A head's tiles, and its normaliser in two parts."""

    tiles: Tiles
    top_N: Tensor
    log_exp_N: Tensor


class _Piece(NamedTuple):
    """Some rows of a tile of both heads."""

    rows: slice
    log_p: Tensor
    log_q: Tensor
    z: tuple[Tensor, Tensor]
    """Where the logits were, [rows, K]: room for their gradients."""


class _Pair:
    """Log-probabilities of both heads by tiles that lie side by side."""

    def __init__(self, heads: list[Logits], scales: list[tuple[Tensor, Tensor]], dtype: torch.dtype) -> None:
        nothing = _no_picks(heads[0])
        self.sides = [_Side(Tiles(head, nothing), *scale) for head, scale in zip(heads, scales, strict=True)]
        self.columns = min(
            (side.tiles for side in self.sides), key=lambda tiles: tiles.n_columns_tile
        ).columns
        """Those of the head with the narrower tiles, which fit into the other's buffers too."""
        self.dtype = dtype

    def across(self, columns: slice) -> Iterator[tuple[slice, tuple[Tensor, Tensor]]]:
        """Rows and both heads' logits, part of the vocabulary by part."""
        student, teacher = (side.tiles.across(columns) for side in self.sides)
        for of_student, of_teacher in zip(student, teacher, strict=True):
            yield of_student.rows, (of_student.z_RK, of_teacher.z_RK)

    def pieces(self, rows: slice, z: tuple[Tensor, Tensor]) -> Iterator[_Piece]:
        """A tile, piece by piece."""
        step = max(1, PIECE_ELEMENTS // z[0].shape[1])
        for start in range(0, rows.stop - rows.start, step):
            part = slice(rows.start + start, min(rows.start + start + step, rows.stop))
            own = z[0][start : start + step], z[1][start : start + step]
            log_p, log_q = (
                (one - side.top_N[part, None]).sub_(side.log_exp_N[part, None]).to(self.dtype)
                for one, side in zip(own, self.sides, strict=True)
            )
            yield _Piece(part, log_p, log_q, own)


def _no_picks(logits: Logits) -> Picks:
    nothing = logits.h_ND.new_empty(0, dtype=torch.int64)
    return Picks(nothing, nothing)


def _scale(logits: Logits, group: str) -> tuple[Tensor, Tensor]:
    """The largest logit of each row, and log sum exp(z - largest), of all ranks."""
    backend: Backend = backend_for(logits)
    if group:
        backend = Sharded(backend, group)
    sums = backend.sums(logits, _no_picks(logits), Asks())
    return sums.top_N, sums.exp_N.log()


def between_heads(
    student: Logits, teacher: Logits, measure: Measure, dtype: torch.dtype, group: str = ""
) -> Tensor:
    """The divergence of each row, [N] in a dtype; differentiable.

    With a process group both heads are this rank's part of their vocabulary.
    """
    rules = [student.rule, teacher.rule]
    found_N: Tensor = _Divergence.apply(measure, rules, dtype, group, *student[:5], *teacher[:5])  # type: ignore[no-untyped-call]
    return found_N


def _heads(tensors: tuple[Any, ...], rules: list[LogitRule]) -> list[Logits]:
    sides = tensors[:5], tensors[5:]
    return [
        Logits(h_ND, w_VD, bias_V, a_NR, b_VR, rule)
        for (h_ND, w_VD, bias_V, a_NR, b_VR), rule in zip(sides, rules, strict=True)
    ]


class _Divergence(torch.autograd.Function):
    """Two heads' divergence, N rows."""

    @staticmethod
    def forward(
        ctx: Any,
        measure: Measure,
        rules: list[LogitRule],
        dtype: torch.dtype,
        group: str,
        *tensors: Tensor | None,
    ) -> Tensor:
        heads = _heads(tensors, rules)
        scales = [_scale(head, group) for head in heads]
        pair = _Pair(heads, scales, dtype)
        found_N = heads[0].h_ND.new_zeros(len(heads[0].h_ND), dtype=dtype)
        rate_sums = [torch.zeros_like(found_N) for _ in heads]
        for columns in pair.columns:
            for rows, z in pair.across(columns):
                for piece in pair.pieces(rows, z):
                    rates = measure.rates(piece.log_p, piece.log_q)
                    for sum_N, rate in zip(rate_sums, rates, strict=True):
                        sum_N[piece.rows] += rate.sum(dim=1)
                    found_N[piece.rows] += rates[0].add_(rates[1]).sum(dim=1)
        found_N, *rate_sums = over_ranks(torch.stack([found_N, *rate_sums]), group).unbind()
        ctx.measure, ctx.rules, ctx.dtype, ctx.group = measure, rules, dtype, group
        ctx.save_for_backward(*tensors, *scales[0], *scales[1], *rate_sums)
        return found_N.clamp(min=0.0)

    @staticmethod
    def backward(ctx: Any, gradient_N: Tensor) -> tuple[Any, ...]:
        tensors, rest = ctx.saved_tensors[:10], ctx.saved_tensors[10:]
        scales, rate_sums = [(rest[0], rest[1]), (rest[2], rest[3])], rest[4:]
        needs = ctx.needs_input_grad[4:]
        heads = _heads(tensors, ctx.rules)
        join = functools.partial(over_ranks, group=ctx.group)
        with torch.no_grad(), torch.autocast(gradient_N.device.type, enabled=False):
            pair = _Pair(heads, scales, ctx.dtype)
            totals = [
                _totals(head, own) if any(own) else None
                for head, own in zip(heads, (needs[:5], needs[5:]), strict=True)
            ]
            back = _Back(pair, ctx.measure, gradient_N, rate_sums, totals)
            for columns in pair.columns:
                back.add(columns)
            found = [
                part
                for total in totals
                for part in (with_totals(total.rounded(), join) if total else [None] * len(Gradients._fields))
            ]
        wanted = (part if need else None for part, need in zip(found, needs, strict=True))
        return None, None, None, None, *(None if part is None else first_only(part) for part in wanted)


def _totals(head: Logits, needs: tuple[bool, ...]) -> _Totals:
    return _Totals(head, Needs(needs[0], needs[1], needs[2], needs[3] or needs[4]), in_parts=True)


class _Back(NamedTuple):
    """The pass back; a head that wants no gradients has no totals."""

    pair: _Pair
    measure: Measure
    gradient_N: Tensor
    rate_sums: tuple[Tensor, ...]
    totals: list[_Totals | None]

    def add(self, columns: slice) -> None:
        """A part of the vocabulary's share of all gradients."""
        sums = [None if total is None else total._part(columns) for total in self.totals]
        for rows, z in self.pair.across(columns):
            for piece in self.pair.pieces(rows, z):
                self._to_gradients(piece)
            for side, total, sum_KW, dz_RK in zip(self.pair.sides, self.totals, sums, z, strict=True):
                if total is not None and sum_KW is not None:
                    _add_products(side, total, sum_KW, dz_RK, rows, columns)
        for total, sum_KW in zip(self.totals, sums, strict=True):
            if total is not None and sum_KW is not None:
                total._finish(columns, sum_KW)

    def _to_gradients(self, piece: _Piece) -> None:
        """Logits become the gradients of h w^T + bias, in their place."""
        rows = piece.rows
        rates = self.measure.rates(piece.log_p, piece.log_q)
        log_probs = piece.log_p, piece.log_q
        for i, (side, total, rate) in enumerate(zip(self.pair.sides, self.totals, rates, strict=True)):
            if total is None:
                continue
            rate.addcmul_(log_probs[i].exp(), self.rate_sums[i][rows, None], value=-1.0)
            softcap, logit_scale, temperature = side.tiles.logits.rule
            rate.mul_(self.gradient_N[rows, None] * (logit_scale / temperature))
            if softcap is not None:
                rate.mul_((piece.z[i] * (temperature / softcap)).square_().neg_().add_(1.0))
            if side.tiles.logits.bias_V is not None:
                rate.masked_fill_(log_probs[i].isneginf(), 0.0)
            piece.z[i].copy_(rate)


def _add_products(
    side: _Side, total: _Totals, sum_KW: Tensor, dz_RK: Tensor, rows: slice, columns: slice
) -> None:
    """What a tile of gradients adds to those of the head's tensors."""
    products = side.tiles.products
    if total.left.stop > total.left.start:
        products.add_dh(dz_RK, total.left, total.dh_NW[rows])
    if total.right.stop > total.right.start:
        products.add_dw(dz_RK, rows, total.right, sum_KW)
    if total.dbias_V is not None:
        total.dbias_V[columns] += dz_RK.sum(dim=0)


class _FirstOnly(torch.autograd.Function):
    """The identity, of which a derivative is refused."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        raise RuntimeError("a divergence of two heads has a first derivative only")


def first_only(gradient: Tensor) -> Tensor:
    """A gradient that is not itself differentiable: who tries gets an error, not silently a constant."""
    if not torch.is_grad_enabled():
        return gradient
    found: Tensor = _FirstOnly.apply(gradient.requires_grad_())  # type: ignore[no-untyped-call]
    return found
