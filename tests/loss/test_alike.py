"""Products whose rows do not know their place, on a BLAS whose do as well."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from gyrocompass.loss import _alike
from gyrocompass.loss._alike import addmm_alike

ADDMM = Tensor.addmm_
Addmm = Callable[..., Tensor]


def by_address(total_RX: Tensor, left_RY: Tensor, right_YX: Tensor, *, beta: float = 1.0) -> Tensor:
    """What MKL does on AMD: rows off a boundary of 16 bytes have other bits."""
    ADDMM(total_RX, left_RY, right_YX, beta=beta)
    for total_X, left_Y in zip(total_RX, left_RY, strict=True):
        if total_X.data_ptr() % 16 or left_Y.data_ptr() % 16:
            total_X *= 1.0 + 4 * torch.finfo(total_X.dtype).eps
    return total_RX


def by_place(total_RX: Tensor, left_RY: Tensor, right_YX: Tensor, *, beta: float = 1.0) -> Tensor:
    """Every second row has other bits, whatever its address."""
    ADDMM(total_RX, left_RY, right_YX, beta=beta)
    total_RX[1::2] *= 1.0 + 4 * torch.finfo(total_RX.dtype).eps
    return total_RX


@pytest.fixture(params=[ADDMM, by_address, by_place], ids=["the machine's", "by address", "by place"])
def blas(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Addmm]:
    _alike._trial.cache_clear()
    monkeypatch.setattr(Tensor, "addmm_", request.param)
    yield request.param
    _alike._trial.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(128, 67, 333), (128, 64, 1000), (31, 33, 65)], ids=str)
@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_a_rows_bits_are_its_own(
    blas: Addmm, beta: float, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    n_rows, width, n_columns = shape
    generator = torch.Generator().manual_seed(width)
    left_RY = torch.randn(n_rows, width, dtype=dtype, generator=generator)
    right_YX = torch.randn(n_columns, width, dtype=dtype, generator=generator).T
    total_RX = torch.randn(n_rows, n_columns, dtype=dtype, generator=generator)

    def product(addmm: Callable[..., object], order: Tensor) -> Tensor:
        found_RX = total_RX[order]
        addmm(found_RX, left_RY[order], right_YX, beta=beta)
        return found_RX

    turned = torch.arange(n_rows).roll(1)
    whole_RX = product(addmm_alike, torch.arange(n_rows))
    torch.testing.assert_close(whole_RX, beta * total_RX + left_RY @ right_YX)
    assert torch.equal(product(addmm_alike, turned), whole_RX[turned])
    if blas is by_place:
        assert not torch.equal(product(blas, turned), product(blas, torch.arange(n_rows))[turned])


def test_what_holds_is_tried_once_and_used_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*factors: Tensor, **options: float) -> Tensor:
        calls.append(factors)
        return ADDMM(*factors, **options)

    _alike._trial.cache_clear()
    monkeypatch.setattr(Tensor, "addmm_", counted)
    total_RX, left_RY, right_YX = torch.zeros(16, 32), torch.ones(16, 16), torch.ones(16, 32)
    for _ in range(3):
        addmm_alike(total_RX, left_RY, right_YX)
    assert len(calls) == 4
    assert all(call[0] is total_RX for call in calls[1:])
