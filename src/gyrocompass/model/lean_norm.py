"""Norms and gates that keep only what their backward pass needs.

    RMSNorm    y = w * (x r),  r = (mean(x^2) + eps)^(-1/2)       keeps x and r
    gate       y = silu(g) * u                                    keeps g and u

`transformers` writes them as several operations, each of which keeps its factors: of an RMSNorm over bf16
rows two float32 copies of them, of a gate its own activation. In a small model these are a third of what a
step holds. Values are those of `transformers`, bit by bit, which `make_lean` sees for each module before it
swaps it; gradients are made by the steps that autograd takes, and have the same bits too.

Left out: norms of other forms (Gemma's 1 + w, LayerNorm), gates by other functions.

Shape legend: N rows of any leading shape, D features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _norm(x_ND: Tensor, w_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y and r."""
    wide_ND = x_ND.float()
    r_N1 = torch.rsqrt(wide_ND.pow(2).mean(-1, keepdim=True) + eps)
    return w_D * (wide_ND * r_N1).to(x_ND.dtype), r_N1


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, w_D: Tensor, eps: float) -> Tensor:
        y_ND, r_N1 = _norm(x_ND, w_D, eps)
        ctx.save_for_backward(x_ND, w_D, r_N1)
        ctx.eps = eps
        return y_ND

    @staticmethod
    def backward(ctx: Any, dy_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, w_D, r_N1 = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_differentiable(lambda x_ND, w_D: _norm(x_ND, w_D, ctx.eps)[0], (x_ND, w_D), dy_ND), None
        wide_ND = x_ND.float()
        dx_ND = dw_D = None
        if ctx.needs_input_grad[0]:
            d_ND = (dy_ND * w_D).float()
            dr_N1 = (d_ND * wide_ND).sum(-1, keepdim=True)
            mean_N1 = (-0.5 * dr_N1) * r_N1.pow(3) / wide_ND.shape[-1]
            dx_ND = (d_ND * r_N1 + mean_N1 * (2 * wide_ND)).to(x_ND.dtype)
        if ctx.needs_input_grad[1]:
            product_ND = dy_ND * (wide_ND * r_N1).to(x_ND.dtype)
            dw_D = product_ND.sum(tuple(range(product_ND.dim() - 1))).to(w_D.dtype)
        return dx_ND, dw_D, None


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g_ND: Tensor, u_ND: Tensor) -> Tensor:
        ctx.save_for_backward(g_ND, u_ND)
        return F.silu(g_ND) * u_ND

    @staticmethod
    def backward(ctx: Any, dy_ND: Tensor) -> tuple[Tensor | None, ...]:
        g_ND, u_ND = ctx.saved_tensors
        if torch.is_grad_enabled():
            return tuple(_differentiable(lambda g_ND, u_ND: F.silu(g_ND) * u_ND, (g_ND, u_ND), dy_ND))
        dg_ND = du_ND = None
        if ctx.needs_input_grad[1]:
            du_ND = dy_ND * F.silu(g_ND)
        if ctx.needs_input_grad[0]:
            dg_ND = torch.ops.aten.silu_backward(dy_ND * u_ND, g_ND)
        return dg_ND, du_ND


def _differentiable(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], dy: Tensor
) -> list[Tensor | None]:
    """Gradients that are to be differentiated again (`create_graph`)."""
    wanted = [one for one in inputs if one.requires_grad]
    found = iter(torch.autograd.grad(function(*inputs), wanted, dy, create_graph=True))
    return [next(found) if one.requires_grad else None for one in inputs]


class LeanNorm(nn.Module):
    """In place of an RMSNorm of `transformers`, with its parameters."""

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """See the module."""
        if torch.compiler.is_compiling():  # a compiler chooses by itself what is kept
            return _norm(hidden_states, self.weight, self.variance_epsilon)[0]
        answer: Tensor = _Norm.apply(hidden_states, self.weight, self.variance_epsilon)  # type: ignore[no-untyped-call]
        return answer


class LeanMLP(nn.Module):
    """In place of a gated MLP of `transformers`, with its layers."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """See the module."""
        g, u = self.gate_proj(x), self.up_proj(x)
        if torch.compiler.is_compiling():
            gated: Tensor = F.silu(g) * u
        else:
            gated = _Gate.apply(g, u)  # type: ignore[no-untyped-call]
        answer: Tensor = self.down_proj(gated)
        return answer


def make_lean(model: nn.Module) -> None:
    """Let norms and gates keep less, wherever that changes no bit of what they say.

    Weights and names stay as they are.
    """
    for module in model.modules():
        other = _lean_class(module)
        if other is not None and _says_the_same(module, other):
            module.__class__ = other


def _lean_class(module: nn.Module) -> type[nn.Module] | None:
    if type(module).__name__.endswith("RMSNorm") and {"weight", "variance_epsilon"} <= {*dir(module)}:
        return LeanNorm
    layers = ("gate_proj", "up_proj", "down_proj")
    if all(isinstance(getattr(module, name, None), nn.Linear) for name in layers):
        return LeanMLP
    return None


@torch.no_grad()
def _says_the_same(module: Any, other: type[nn.Module]) -> bool:
    """On two drawn rows; a module of another form fails or differs."""
    layer = module if other is LeanNorm else module.gate_proj
    features = layer.weight.shape[-1]
    draw = torch.Generator().manual_seed(0)
    x_ND = torch.randn(1, 2, features, generator=draw).to(layer.weight.device, layer.weight.dtype)
    if x_ND.device.type == "meta":
        return False
    try:
        return torch.equal(module(x_ND), other.forward(module, x_ND))
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return False
