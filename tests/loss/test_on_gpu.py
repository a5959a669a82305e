"""The loss as callers have it, on a GPU, at widths where the library makes logits: needs a GPU.

`test_triton.py` has the kernels, here and in Triton's interpreter.

Shape legend: T tokens, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gyrocompass.loss import _triton
from gyrocompass.loss.logprob import WANTS, token_logprobs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

BOUND = {torch.float32: 1e-6, torch.bfloat16: 3e-3}
IGNORED = -100


def inputs(
    dtype: torch.dtype, n_tokens: int = 600, width: int = 1024, vocabulary: int = 5003
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(n_tokens)
    h_TD = torch.randn(n_tokens, width, generator=generator, device="cuda").to(dtype)
    w_VD = (3 * torch.randn(vocabulary, width, generator=generator, device="cuda") / width**0.5).to(dtype)
    target_T = torch.randint(vocabulary, (n_tokens,), generator=generator, device="cuda")
    target_T[::7] = IGNORED
    return h_TD.requires_grad_(), w_VD.requires_grad_(), target_T


def mean_nll(h_TD: Tensor, w_VD: Tensor, target_T: Tensor) -> Tensor:
    answer = token_logprobs(h_TD, w_VD, target_T, want=(), expect=lambda found: -found.logprob_T.sum())
    return -answer.logprob_T.sum() / (target_T != IGNORED).sum()


def every_statistic(h_TD: Tensor, w_VD: Tensor, target_T: Tensor) -> Tensor:
    found = token_logprobs(h_TD, w_VD, target_T, want=WANTS)
    assert found.entropy_T is not None and found.mean_logit_T is not None and found.sum_sq_T is not None
    mixed_T = -found.logprob_T + 0.1 * found.entropy_T + 0.01 * found.lse_T.square()
    return (mixed_T + 0.2 * found.mean_logit_T + found.sum_sq_T)[target_T != IGNORED].mean()


def direct_nll(h_TD: Tensor, w_VD: Tensor, target_T: Tensor) -> Tensor:
    return F.cross_entropy(h_TD @ w_VD.T, target_T, ignore_index=IGNORED)


def direct_statistics(h_TD: Tensor, w_VD: Tensor, target_T: Tensor) -> Tensor:
    counted_T = target_T != IGNORED
    z_TV = h_TD[counted_T] @ w_VD.T
    log_p_TV = z_TV.log_softmax(1)
    p_TV = log_p_TV.exp()
    nll_T = -log_p_TV.gather(1, target_T[counted_T][:, None])[:, 0]
    mixed_T = nll_T - 0.1 * (p_TV * log_p_TV).sum(1) + 0.01 * z_TV.logsumexp(1).square()
    return (mixed_T + 0.2 * z_TV.mean(1) + p_TV.square().sum(1)).mean()


def with_gradients(
    loss: Callable[[Tensor, Tensor, Tensor], Tensor], given: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    value = loss(*given)
    return (value.detach(), *torch.autograd.grad(value, given[:2]))


@pytest.mark.parametrize("kept_rows", [256, 4096])
@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("route", ["separable", "two-pass"])
def test_values_and_gradients(route: str, dtype: torch.dtype, kept_rows: int) -> None:
    """In three blocks of rows and in one."""
    ours, direct = {
        "separable": (mean_nll, direct_nll),
        "two-pass": (every_statistic, direct_statistics),
    }[route]
    given = inputs(dtype)
    h_TD, w_VD, target_T = given
    kept_bytes = kept_rows * len(w_VD) * dtype.itemsize
    exact = (h_TD.detach().double().requires_grad_(), w_VD.detach().double().requires_grad_(), target_T)
    with mock.patch.object(_triton, "KEPT_BYTES", kept_bytes):
        found = with_gradients(ours, given)
    wanted = with_gradients(direct, exact)
    assert abs(float(found[0]) - float(wanted[0])) < 2e-5
    for own, expected in zip(found[1:], wanted[1:], strict=True):
        assert own.dtype == dtype
        assert (own.double() - expected).norm() < BOUND[dtype] * expected.norm()


def test_both_routes_hold_no_logits() -> None:
    given = inputs(torch.bfloat16, n_tokens=16384, vocabulary=65536)
    logits_bytes = 16384 * 65536 * 2
    for loss in (mean_nll, every_statistic):
        with (
            mock.patch.object(_triton, "KEPT_BYTES", 256 << 20),
            mock.patch.object(_triton, "MOST_BLOCKS", 64),
        ):
            with_gradients(loss, given)
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            with_gradients(loss, given)
        gradients = sum(tensor.nbytes for tensor in given[:2])
        assert torch.cuda.max_memory_allocated() - before - gradients < logits_bytes / 2


def test_compiled_without_a_graph_break() -> None:
    given = inputs(torch.bfloat16, n_tokens=64)
    compiled = torch.compile(mean_nll, fullgraph=True)
    for own, expected in zip(with_gradients(compiled, given), with_gradients(mean_nll, given), strict=True):
        torch.testing.assert_close(own, expected)


def test_same_bits_again() -> None:
    given = inputs(torch.bfloat16)
    first, second = (with_gradients(mean_nll, given) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
