"""The primitive under `torch.func`: its operators as functions that grad and vjp can look into, twice.

torch differentiates an operator of `torch.library` by a kind of function that its functional transforms
refuse; the same formulas in the kind that they take are here. There is no forward mode, and no rule for
`vmap`: all positions are in one call already.

Shape legend: none; tensors are as `_ops.py` has them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from gyrocompass.core.errors import BadInput
from gyrocompass.loss import _ops
from gyrocompass.loss._ops import _N_FIELDS, _N_GIVEN, Inputs, Settings


def under_transform() -> bool:
    """Whether a transform of `torch.func` is at work."""
    return torch._C._are_functorch_transforms_active()


def functional_forward(inputs: Inputs, settings: Settings) -> list[Tensor]:
    """What the operator answers, differentiable under transforms."""
    return list(_Forward.apply(*inputs, *settings))  # type: ignore[no-untyped-call]


def check_no_tangent(inputs: Inputs) -> None:
    """Raise BadInput under forward-mode differentiation: the operator would answer without a tangent."""
    if any(part is not None and forward_ad.unpack_dual(part).tangent is not None for part in inputs):
        _no_forward_mode()


def _no_forward_mode(*_: Any) -> Any:
    raise BadInput(
        "token_logprobs has no forward-mode derivative (jvp), on which hessian is built too",
        fix="use reverse mode: autograd.grad, torch.func.grad or vjp; or backend='reference', which has both",
    )


def _no_vmap(*_: Any) -> Any:
    raise BadInput(
        "token_logprobs cannot be mapped over by vmap, on which jacrev is built too",
        fix="put all positions into one call; for a Jacobian, one vjp after another or backend='reference'",
    )


class _Forward(torch.autograd.Function):
    """The operator, and the one that goes back."""

    jvp = staticmethod(_no_forward_mode)  # type: ignore[assignment]
    vmap = staticmethod(_no_vmap)

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return tuple(_ops._forward(*arguments))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*(field for field in output if not field.is_floating_point()))
        _ops._setup(ctx, inputs, list(output))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        return _ops._differentiate(ctx, list(gradients), _back)


def _back(gradients: Any, saved: Any, needs: list[bool], *rest: Any) -> tuple[Tensor, ...]:
    given, plain = rest[:_N_GIVEN], rest[_N_GIVEN:]
    found: tuple[Tensor, ...] = _Back.apply(needs, plain, *gradients, *saved, *given)  # type: ignore[no-untyped-call]
    return found


class _Back(torch.autograd.Function):
    """The operator that goes back, and the second derivative; lists are taken apart, as functions want it."""

    jvp = staticmethod(_no_forward_mode)  # type: ignore[assignment]
    vmap = staticmethod(_no_vmap)

    @staticmethod
    def forward(needs: list[bool], plain: tuple[Any, ...], *tensors: Any) -> tuple[Tensor, ...]:
        gradients, saved, given = _parts(tensors)
        return tuple(_ops._backward(gradients, saved, needs, *given, *plain))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        needs, plain, *tensors = inputs
        gradients, saved, given = _parts(tensors)
        _ops._setup_again(ctx, (gradients, saved, needs, *given, *plain), list(output))

    @staticmethod
    def backward(ctx: Any, *along: Tensor | None) -> tuple[Any, ...]:
        wanted = ctx.needs_input_grad[2:]
        of_gradients, _, of_given = _parts(wanted)
        of_fields, of_tensors = _ops._second_of(
            ctx, list(along), of_gradients, of_given[:5], _second_derivative
        )
        n_saved, n_others = len(wanted) - _N_FIELDS - _N_GIVEN, _N_GIVEN - 5
        return (None, None, *of_fields, *[None] * n_saved, *of_tensors, *[None] * n_others)


def _second_derivative(
    along: Any, gradients: Any, saved: Any, needs: list[bool], *rest: Any
) -> tuple[Tensor, ...]:
    given, plain = rest[:_N_GIVEN], rest[_N_GIVEN:]
    arguments = (needs, plain, *along, *gradients, *saved, *given)
    found: tuple[Tensor, ...] = _Second.apply(*arguments)  # type: ignore[no-untyped-call]
    return found


class _Second(torch.autograd.Function):
    """The operator of second derivatives; there is no third one."""

    jvp = staticmethod(_no_forward_mode)  # type: ignore[assignment]
    vmap = staticmethod(_no_vmap)

    @staticmethod
    def forward(needs: list[bool], plain: tuple[Any, ...], *tensors: Any) -> tuple[Tensor, ...]:
        along, (gradients, saved, given) = list(tensors[:5]), _parts(tensors[5:])
        return tuple(_ops._second(along, gradients, saved, needs, *given, *plain))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        raise RuntimeError(_ops.NO_THIRD)


def _parts(tensors: Any) -> tuple[list[Any], list[Any], list[Any]]:
    """Gradients of the fields, what was saved, and what was given."""
    together = list(tensors)
    return together[:_N_FIELDS], together[_N_FIELDS:-_N_GIVEN], together[-_N_GIVEN:]
