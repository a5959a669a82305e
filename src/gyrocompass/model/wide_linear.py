"""bf16 linear layers on CPUs without bf16 units: products in float32, rounded once.

    y = bf16(x w^T + b)        dx = bf16(dy w)        dw = bf16(dy^T x)        each product in float32

Where a processor multiplies no bf16, torch does it element by element: the three products of a layer over
2,048 tokens take 17 times as long as float32 ones (decision 0016). Widening costs a copy of each factor,
which is little beside a product of many rows; a single row stays narrow. The result is what bf16 units give:
float32 sums, rounded at the end. Weights, what is kept for the backward pass and gradients stay bf16.

Left out: attention, whose bf16 products are torch's own, and layers that are not `nn.Linear` (GPT-2's).

Shape legend: N rows of any leading shape, I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class WideLinear(nn.Linear):
    """A linear layer of the same parameters, which multiplies in float32."""

    def forward(self, input: Tensor) -> Tensor:
        """See the module."""
        narrow = input.dtype == self.weight.dtype == torch.bfloat16 and input.device.type == "cpu"
        if not narrow or input.numel() == self.in_features:
            return super().forward(input)
        answer: Tensor = _WideProduct.apply(input, self.weight, self.bias)  # type: ignore[no-untyped-call]
        return answer


class _WideProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, w_OI: Tensor, b_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_NI, w_OI)
        return F.linear(x_NI.float(), w_OI.float(), None if b_O is None else b_O.float()).to(x_NI.dtype)

    @staticmethod
    def backward(ctx: Any, dy_NO: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, w_OI = ctx.saved_tensors
        dy_NO = dy_NO.float()
        dx_NI = dw_OI = db_O = None
        if ctx.needs_input_grad[0]:
            dx_NI = (dy_NO @ w_OI.float()).to(x_NI.dtype)
        flat_NO = dy_NO.flatten(0, -2)
        if ctx.needs_input_grad[1]:
            dw_OI = (flat_NO.T @ x_NI.flatten(0, -2).float()).to(w_OI.dtype)
        if ctx.needs_input_grad[2]:
            db_O = flat_NO.sum(0).to(w_OI.dtype)
        return dx_NI, dw_OI, db_O


def widen_where_narrow_is_slow(model: Any) -> None:
    """Let the linear layers inside a bf16 model multiply in float32, if this CPU has no bf16 units.

    Weights and names stay as they are. The head is left to the primitive, which widens by itself.
    """
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for module in model.modules():
        if type(module) is nn.Linear and module is not head:
            module.__class__ = WideLinear
