"""One suite over every backend: sums and gradients, both routes, against the definitions in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from direct_backend import direct_gradients, direct_sums, full_logits
from direct_question import log_probs
from direct_signal import tile_sizes
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gyrocompass.loss._backends import BACKENDS
from gyrocompass.loss._noise import gumbel
from gyrocompass.loss._question import Asks, Gradients, LogitRule, Logits, Needs, Picks, Slopes, Sums

FLOATS = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
DTYPES = ["f64 f64", "f32 f32", "bf16 bf16", "f16 f16", "bf16 f32", "f32 bf16"]
SUM_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
"""Relative to the sum's own size; products of few terms, so that rounding is all that differs."""
GRADIENT_TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}
"""Of the norm of the error over the norm of the terms' magnitudes: where a gradient's terms cancel, what is
left is no measure of how they were rounded. Sizes and slopes are random here: one bf16 number alone may be
off by 4e-3, and the terms of one dz (a + b x + c e^x) may cancel before it is a term. With the slopes of real
losses `test_error_bounds.py` asks for the promised 3e-3 and 1e-6."""
FEW = 8
AMX_TOLERANCE = 1e-2
"""Where the products of a tile are rounded to bf16 before they are added up."""
LOGPROB_NATS = {torch.float64: 1e-11, torch.float32: 5e-6}
"""The promised bound, and 4 roundings of the log-probability itself, which are more where it is large."""


@st.composite
def questions(draw: st.DrawFn, dtypes: str) -> tuple[Logits, Picks, Asks]:
    """A question with any mixture of features; sizes on both sides of the backends' inner blocks."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    n_rows = draw(st.sampled_from([0, 1, 3, 17, 40, 70]))
    width = draw(st.sampled_from([1, 2, 7, 32, 65]))
    vocabulary = draw(st.sampled_from([1, 2, 5, 33, 130, 301]))
    h_dtype, w_dtype = (FLOATS[name] for name in dtypes.split())
    h_ND, w_VD = normal(n_rows, width).to(h_dtype), (normal(vocabulary, width) / width**0.5).to(w_dtype)
    bias_V = None
    if draw(st.booleans()):
        bias_V = normal(vocabulary).to(w_dtype)
        outside_V = torch.rand(vocabulary, generator=generator) < draw(st.sampled_from([0.0, 0.3]))
        outside_V[draw(st.integers(0, vocabulary - 1))] = False
        bias_V = bias_V.masked_fill(outside_V, -torch.inf)
    a_NR = b_VR = None
    if draw(st.booleans()):
        rank = draw(st.sampled_from([1, 4, 9]))
        a_NR, b_VR = normal(n_rows, rank).to(h_dtype), normal(vocabulary, rank).to(w_dtype)
    rule = LogitRule(
        draw(st.sampled_from([None, 2.0, 30.0])),
        draw(st.sampled_from([1.0, 0.5])),
        draw(st.sampled_from([1.0, 0.7])),
    )
    logits = Logits(h_ND, w_VD, bias_V, a_NR, b_VR, rule)
    dtype = logits.dtype
    if draw(st.booleans()):
        logits = logits._replace(floor_N=(0.3 * normal(n_rows) - 0.5).to(dtype))
    n_picks = draw(st.sampled_from([0, n_rows, 3 * n_rows]))
    row_P = torch.randint(max(n_rows, 1), (n_picks,), generator=generator).sort().values
    picks = Picks(row_P, torch.randint(-1, vocabulary, (n_picks,), generator=generator))
    asks = Asks(
        entropy=draw(st.booleans()),
        mean_logit=draw(st.booleans()),
        sum_sq=draw(st.booleans()),
        threshold_N=normal(n_rows).to(dtype) if draw(st.booleans()) else None,
        top=draw(st.sampled_from([0, 1, 4])) if vocabulary >= 4 else 0,
        seed_N=torch.randint(2**62, (n_rows,), generator=generator) if draw(st.booleans()) else None,
        first_token=draw(st.sampled_from([0, 1000])),
    )
    return logits, picks, asks


def some_slopes(top_N: Tensor, n_picks: int, dtype: torch.dtype, draw: Any) -> Slopes:
    """Random slopes, with a top a little above the largest logits (far above them where there is none)."""
    n_rows = len(top_N)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(n: int) -> Tensor:
        return torch.randn(n, generator=generator, dtype=torch.float64).to(dtype)

    def maybe(n: int) -> Tensor | None:
        return normal(n) if draw(st.booleans()) else None

    top_N = top_N.clamp(min=-30.0).to(dtype) + 0.1 * normal(n_rows).abs()
    return Slopes(top_N, normal(n_rows), maybe(n_rows), maybe(n_rows), maybe(n_rows), normal(n_picks))


def far_from_every_edge(logits: Logits, asks: Asks) -> bool:
    """No logit so near a floor or a threshold that rounding decides on which side it is."""
    z_NV, _, _ = full_logits(logits)
    edges = [edge for edge in (logits.floor_N, asks.threshold_N) if edge is not None]
    return all(float((z_NV - edge[:, None].double()).abs().min()) > 1e-4 for edge in edges if z_NV.numel())


def assert_sums(actual: Sums, expected: Sums, dtype: torch.dtype, tolerance: float) -> None:
    for name, wanted in expected._asdict().items():
        found = getattr(actual, name)
        assert (found is None) == (wanted is None), name
        if wanted is None:
            continue
        assert found.shape == wanted.shape, name
        if not wanted.is_floating_point():
            assert found.dtype == torch.int64, name
            continue
        assert found.dtype == dtype, name
        finite = wanted.isfinite()
        assert torch.equal(found.double()[~finite], wanted[~finite]), name
        torch.testing.assert_close(
            found.double()[finite],
            wanted[finite],
            rtol=tolerance,
            atol=4 * tolerance,
            msg=lambda m, n=name: f"{n}: {m}",
        )
    assert actual.above_N is None or torch.equal(actual.above_N, expected.above_N)  # type: ignore[arg-type]


def assert_same_choices(actual: Sums, expected: Sums, logits: Logits, asks: Asks) -> None:
    """The chosen tokens' float64 values are the best there are: near ties may go either way."""
    z_NV, _, allowed_NV = full_logits(logits)
    tolerance = 1e-4
    if asks.seed_N is not None and actual.drawn_N is not None and expected.drawn_key_N is not None:
        some_N = allowed_NV.any(1)
        token_V = torch.arange(z_NV.shape[1]) + asks.first_token
        keys_NV = z_NV + gumbel(asks.seed_N, token_V, torch.float64)
        drawn_N = actual.drawn_N[some_N]
        assert allowed_NV[some_N].gather(1, drawn_N[:, None]).all()
        chosen_N = keys_NV[some_N].gather(1, drawn_N[:, None])[:, 0]
        torch.testing.assert_close(chosen_N, expected.drawn_key_N[some_N], rtol=0, atol=tolerance)
    if actual.top_token_NK is not None and expected.top_NK is not None:
        there_NK = expected.top_NK.isfinite()
        chosen_NK = z_NV.gather(1, actual.top_token_NK.clamp(0, z_NV.shape[1] - 1))
        torch.testing.assert_close(chosen_NK[there_NK], expected.top_NK[there_NK], rtol=0, atol=tolerance)
        for row, there in zip(actual.top_token_NK, there_NK, strict=True):
            assert len(set(row[there].tolist())) == int(there.sum())


def assert_log_probs(actual: Sums, expected: Sums, picks: Picks, dtype: torch.dtype) -> None:
    found_P, wanted_P = log_probs(actual, picks).double(), log_probs(expected, picks)
    finite = wanted_P.isfinite()
    rounding = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(found_P[finite], wanted_P[finite], rtol=rounding, atol=LOGPROB_NATS[dtype])


def assert_gradients(
    actual: Gradients, expected: Gradients, magnitudes: Gradients, logits: Logits, *, rounds_products: bool
) -> None:
    dtypes = dict(
        zip(("dh_ND", "dw_VD", "dbias_V", "da_NR", "db_VR"), (tensor for tensor in logits[:5]), strict=True)
    )
    for name, wanted in expected._asdict().items():
        found = getattr(actual, name)
        assert (found is None) == (wanted is None), name
        if wanted is None:
            continue
        own = dtypes[name]
        assert own is not None and found.dtype == own.dtype and found.shape == wanted.shape, name
        error = float((found.double() - wanted).norm())
        # Products of bf16 inputs round dz to bf16 too.
        narrowest = max(GRADIENT_TOLERANCE[tensor.dtype] for tensor in logits.given)
        narrowest = AMX_TOLERANCE if rounds_products else narrowest
        info = torch.finfo(own.dtype)
        step = info.tiny * info.eps * wanted.numel() ** 0.5  # float16 rounds what is small to this
        # What is written is rounded once more, each number by half a step of its own at most: in a gradient
        # of a few numbers, or where dz is a few (whose rounding then takes all the room), that does not
        # average out.
        if min(wanted.numel(), len(logits.h_ND) * len(logits.w_VD)) <= FEW:
            half = wanted.abs().log2().floor().exp2() * info.eps / 2
            step += float(half.nan_to_num().norm())
        size = float(getattr(magnitudes, name).norm())
        assert error <= narrowest * size + step + 1e-12, (name, error)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_sums_and_gradients(backend: str, dtypes: str, data: st.DataObject) -> None:
    logits, picks, asks = data.draw(questions(dtypes))
    engine = BACKENDS[backend]
    refusal = engine.refusal(logits)
    if refusal is not None:
        pytest.skip(refusal)
    assume(far_from_every_edge(logits, asks))
    needs = Needs(*(data.draw(st.booleans()) for _ in range(4)))
    expected = direct_sums(logits, picks, asks)
    slopes = some_slopes(expected.top_N, len(picks.row_P), logits.dtype, data.draw)
    with tile_sizes(data.draw(st.sampled_from([2, 16, 2048])), data.draw(st.sampled_from([8, 100, 1 << 22]))):
        sums = engine.sums(logits, picks, asks)
        gradients = engine.gradients(logits, picks, slopes, needs)
        seen = []

        def slopes_of(rows: slice, block: Sums, own: slice) -> Slopes:
            seen.append((rows, own))
            parts = (None if field is None else field[rows] for field in slopes[:5])
            return Slopes(*parts, slopes.pick_P[own])  # type: ignore[arg-type]

        fused_sums, fused_gradients = engine.fused(logits, picks, asks, slopes_of, needs)
    rounds_products = backend == "chunked" and dtypes == "bf16 bf16" and torch.cpu._is_amx_tile_supported()
    tolerance = SUM_TOLERANCE[logits.dtype]
    for found in (sums, fused_sums):
        assert_sums(found, expected, logits.dtype, tolerance)
        assert_same_choices(found, expected, logits, asks)
        assert_log_probs(found, expected, picks, logits.dtype)
    wanted = direct_gradients(logits, picks, slopes, needs)
    magnitudes = direct_gradients(logits, picks, slopes, needs, magnitudes=True)
    for part in (gradients, fused_gradients):
        assert_gradients(part, wanted, magnitudes, logits, rounds_products=rounds_products)
    assert [rows.start for rows, _ in seen] == [0, *(rows.stop for rows, _ in seen[:-1])][: len(seen)]
    if seen:
        assert seen[-1][0].stop == len(logits.h_ND) and seen[-1][1].stop == len(picks.row_P)
