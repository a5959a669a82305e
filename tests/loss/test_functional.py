"""The primitive under `torch.func`: reverse mode works, twice; forward mode and vmap say what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from gyrocompass.core.errors import BadInput
from gyrocompass.loss._backends import BACKENDS
from gyrocompass.loss.logprob import token_logprobs
from gyrocompass.loss.signal import IGNORE_INDEX, TokenLogProbs

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
"""What torch itself imports for forward mode."""

T, D, V, R = 5, 3, 11, 2
TARGET_T = torch.tensor([3, IGNORE_INDEX, 10, 0, 6])
CANDIDATE_TC = torch.tensor([[1, 2], [0, 0], [10, 5], [4, IGNORE_INDEX], [6, 7]])


def given() -> list[Tensor]:
    """h, w, bias, a and b."""
    torch.manual_seed(0)
    return [torch.randn(*shape, dtype=torch.float64) for shape in ((T, D), (V, D), (V,), (T, R), (V, R))]


def loss(*parts: Tensor, backend: str = "auto", expect: bool = False) -> Tensor:
    """Of every output that is differentiable."""
    h_TD, w_VD, bias_V, a_TR, b_VR = parts

    def total(answer: TokenLogProbs) -> Tensor:
        fields = [field for field in answer if field is not None and field.is_floating_point()]
        return torch.stack([(field * field.detach().cos()).sum() for field in fields]).sum()

    return total(
        token_logprobs(
            h_TD, w_VD, TARGET_T, bias_V=bias_V, low_rank=(a_TR, b_VR), softcap=4.0, temperature=0.7,
            candidate_TC=CANDIDATE_TC, n_top=0 if expect else 2, backend=backend,
            expect=total if expect else None,
        )
    )  # fmt: skip


@pytest.mark.parametrize("expect", [False, True])
def test_grad_and_vjp_are_autograd(expect: bool) -> None:
    parts = given()
    leaves = [part.clone().requires_grad_() for part in parts]
    wanted = torch.autograd.grad(loss(*leaves, expect=expect), leaves)

    def function(*parts: Tensor) -> Tensor:
        return loss(*parts, expect=expect)

    value, back = torch.func.vjp(function, *parts)
    assert torch.equal(value, function(*parts))
    by_grad = torch.func.grad(function, argnums=tuple(range(5)))(*parts)
    for one, other, exact in zip(by_grad, back(torch.ones_like(value)), wanted, strict=True):
        torch.testing.assert_close(one, exact, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(other, exact, rtol=1e-12, atol=1e-12)


def along(function: Callable[..., Tensor], parts: list[Tensor]) -> tuple[Tensor, ...]:
    """The Hessian times a direction, as the gradient of a gradient's product with it."""
    direction = [torch.cos(part) for part in parts]

    def product(*parts: Tensor) -> Tensor:
        found = torch.func.grad(function, argnums=tuple(range(5)))(*parts)
        return torch.stack([(part * u).sum() for part, u in zip(found, direction, strict=True)]).sum()

    return torch.func.grad(product, argnums=tuple(range(5)))(*parts)  # type: ignore[no-any-return]


def test_the_gradient_of_a_gradient_is_the_references() -> None:
    parts = given()
    wanted = along(lambda *parts: loss(*parts, backend="reference"), parts)
    for one, exact in zip(along(loss, parts), wanted, strict=True):
        torch.testing.assert_close(one, exact, rtol=1e-9, atol=1e-9)


def test_a_third_derivative_is_refused() -> None:
    h_TD, *rest = given()

    def first(h_TD: Tensor) -> Tensor:
        return torch.func.grad(loss)(h_TD, *rest).square().sum()  # type: ignore[no-any-return]

    def second(h_TD: Tensor) -> Tensor:
        return torch.func.grad(first)(h_TD).square().sum()  # type: ignore[no-any-return]

    with pytest.raises(RuntimeError, match="first and second derivatives"):
        torch.func.grad(second)(h_TD)


def dual(function: Callable[[Tensor], Tensor], h_TD: Tensor) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(h_TD, h_TD))).tangent


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("place", range(5))
def test_forward_mode_is_refused_and_never_zero(backend: str, place: int) -> None:
    parts = given()

    def function(part: Tensor) -> Tensor:
        return loss(*parts[:place], part, *parts[place + 1 :], backend=backend)

    with pytest.raises(BadInput, match=r"no forward-mode(.|\n)*torch.func.grad"):
        torch.func.jvp(function, (parts[place],), (parts[place],))
    with pytest.raises(BadInput, match="no forward-mode"):
        dual(function, parts[place])


def test_the_reference_has_a_forward_mode() -> None:
    h_TD, *rest = given()
    _, tangent = torch.func.jvp(lambda h_TD: loss(h_TD, *rest, backend="reference"), (h_TD,), (h_TD,))
    wanted = (torch.func.grad(loss)(h_TD, *rest) * h_TD).sum()
    torch.testing.assert_close(tangent, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("transform", "what"), [(torch.func.hessian, "forward-mode"), (torch.func.jacrev, "vmap")]
)
def test_what_is_built_on_them_says_so(transform: Callable[..., Any], what: str) -> None:
    h_TD, *rest = given()
    with pytest.raises(BadInput, match=rf"{what}(.|\n)*vjp"):
        transform(lambda h_TD: loss(h_TD, *rest))(h_TD)
