"""A scalar head beside the head of words: one number per position, a reward or a value.

    r_t = h_t . w + b

with h_t the hidden state after the final norm, in float32 whatever the model's dtype. It is a layer of the
model that it is attached to, so it trains, moves and is checkpointed with it; on disk it is a file of its own
beside the model's weights, which stay those of a plain causal LM in Hugging Face format.

Left out: heads with hidden layers, several heads, and a value model apart from the policy.

Shape legend: T positions, D hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gyrocompass.core.errors import BadInput
from gyrocompass.model.head import BESIDE, causal_lm, find_head

FILE = "scalar_head.safetensors"
_NAME = f"{BESIDE}scalar_head"


def attach_scalar_head(model: nn.Module) -> nn.Linear:
    """The model's scalar head; a new one, of zeros, where it has none.

    A new head says 0 everywhere: the first loss of a reward model is ln 2, the first advantage the return.
    """
    lm = causal_lm(model)
    if not hasattr(lm, _NAME):
        weight = find_head(model).w_VD
        head = nn.Linear(weight.shape[1], 1, device=weight.device, dtype=_dtype(weight))
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        setattr(lm, _NAME, head)
    found: nn.Linear = getattr(lm, _NAME)
    return found


def has_scalar_head(model: nn.Module) -> bool:
    """Whether the model has one."""
    return hasattr(causal_lm(model), _NAME)


def scalars(model: nn.Module, h_TD: Tensor) -> Tensor:
    """What the scalar head says at each position, [T].

    Raises:
        BadInput: the model has none.
    """
    if not has_scalar_head(model):
        raise BadInput(
            "this model has no scalar head, and an objective or a reward reads one",
            fix="train it with `scalar_head: true`, or use a reward model",
        )
    head: nn.Linear = getattr(causal_lm(model), _NAME)
    with torch.autocast(h_TD.device.type, enabled=False):
        return nn.functional.linear(h_TD.to(head.weight.dtype), head.weight, head.bias).squeeze(-1)


@contextmanager
def without_scalar_head(model: nn.Module) -> Iterator[nn.Linear | None]:
    """The model as a plain causal LM meanwhile, for writing it; gives the head that was taken off."""
    lm = causal_lm(model)
    head: nn.Linear | None = getattr(lm, _NAME, None)
    if head is not None:
        delattr(lm, _NAME)
    try:
        yield head
    finally:
        if head is not None:
            setattr(lm, _NAME, head)


def save_scalar_head(head: nn.Linear, folder: Path) -> None:
    """Write a head beside its model's weights."""
    tensors = {"weight": head.weight, "bias": head.bias}
    save_file({name: x.detach().contiguous().cpu() for name, x in tensors.items()}, folder / FILE)


def load_scalar_head(model: nn.Module, folder: Path) -> None:
    """Attach the head that stands in a model's folder, if there is one.

    Raises:
        BadInput: it is damaged, or of another width.
    """
    path = folder / FILE
    if not path.is_file():
        return
    head = attach_scalar_head(model)
    try:
        head.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        raise BadInput(f"this scalar head cannot be read: {error}", where=path) from error


def _dtype(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32
