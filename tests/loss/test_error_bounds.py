"""How far every backend is from float64: the promised bounds, at sizes that cross every block.

    log-probabilities        5e-6 nats, whatever the dtype: logits and sums are float32 of exact products
    gradients, float32       1e-6 of their norm
    gradients, bf16          3e-3 of their norm: what is summed in float32 is rounded once, to 2^-9 at worst

Two exceptions, each with its reason. On a CPU with AMX the chunked backend's bf16 gradients add products of a
tile that torch rounds to bf16: `AMX` has its bound. (There the native backend, which sees float32 sums, is
the one that is used.) And the native backend's bf16 gradient of few rows is a
sum of few dz, themselves rounded to bf16 before the product on bf16 units: two roundings of up to 4e-3 each
that no average takes away.

The Triton backend is skipped without a GPU; its interpreted kernels are held to their bounds in
`test_triton.py`.

Shape legend: N rows, D hidden width, V vocabulary, P picks, K of a top list.
"""

from __future__ import annotations

import pytest
import torch
from direct_backend import direct_gradients, direct_sums
from direct_question import EVERYTHING, SIZES, Case, log_probs, make

from gyrocompass.loss._backends import BACKENDS
from gyrocompass.loss._question import Backend, Gradients, Slopes, Sums

LOGPROB_NATS = 5e-6
GRADIENT = {torch.bfloat16: 3e-3, torch.float32: 1e-6}
FEW_ROWS = 40
GRADIENT_OF_FEW_ROWS = {torch.bfloat16: 8e-3, torch.float32: 1e-6}
AMX = torch.cpu._is_amx_tile_supported()
GRADIENT_AMX = 1e-2
"""Of the chunked backend for bf16 there."""
LARGE = (40, 64, 128_256)


def taken(backend: str, case: Case) -> Backend:
    engine = BACKENDS[backend]
    refusal = engine.refusal(case.logits)
    if refusal is not None:
        pytest.skip(refusal)
    return engine


def both_routes(engine: Backend, case: Case) -> list[tuple[Sums, Gradients]]:
    """Two passes, and one with the slopes given block by block."""
    logits, picks, asks, slopes = case
    two = engine.sums(logits, picks, asks), engine.gradients(logits, picks, slopes, EVERYTHING)

    def slopes_of(rows: slice, block: Sums, own: slice) -> Slopes:
        by_row = (None if part is None else part[rows] for part in slopes[:5])
        return Slopes(*by_row, slopes.pick_P[own])  # type: ignore[arg-type]

    return [two, engine.fused(logits, picks, asks, slopes_of, EVERYTHING)]


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "everything"])
@pytest.mark.parametrize("dtype", GRADIENT, ids=str)
@pytest.mark.parametrize("size", [*SIZES, LARGE], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_errors_against_float64_are_within_the_bounds(
    backend: str, size: tuple[int, int, int], dtype: torch.dtype, plain: bool
) -> None:
    if size == LARGE and not plain:
        pytest.skip("float64 logits of everything take too long")
    case = make(size, dtype, plain=plain)
    engine = taken(backend, case)
    rounds_products = backend == "chunked" and dtype == torch.bfloat16 and AMX
    expected = direct_sums(case.logits, case.picks, case.asks)
    wanted_P = log_probs(expected, case.picks)
    gradients = direct_gradients(case.logits, case.picks, case.slopes, EVERYTHING)
    few = backend == "native" and size[0] < FEW_ROWS
    bound = (GRADIENT_OF_FEW_ROWS if few else GRADIENT)[dtype]
    bound = GRADIENT_AMX if rounds_products else bound
    for sums, found in both_routes(engine, case):
        assert_sums(sums, expected)
        found_P, finite = log_probs(sums, case.picks).double(), wanted_P.isfinite()
        assert torch.equal(finite, found_P.isfinite())
        torch.testing.assert_close(found_P[finite], wanted_P[finite], rtol=0, atol=LOGPROB_NATS)
        for name, wanted in gradients._asdict().items():
            part = getattr(found, name)
            assert (part is None) == (wanted is None), name
            if part is not None:
                error, norm = float((part.double() - wanted).norm()), float(wanted.norm())
                assert error <= bound * norm + 1e-7, (name, error / norm)


def assert_sums(sums: Sums, expected: Sums) -> None:
    """Every sum; which tokens are drawn and listed is another test's business."""
    for name, wanted in expected._asdict().items():
        found = getattr(sums, name)
        assert (found is None) == (wanted is None), name
        if wanted is not None and name not in ("drawn_N", "top_token_NK"):
            torch.testing.assert_close(
                found.double(),
                wanted.double(),
                rtol=4e-6,
                atol=1e-5,
                msg=lambda m, n=name: f"{n}: {m}",
            )
