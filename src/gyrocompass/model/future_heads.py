"""Heads that predict the tokens after the next one: multi-token prediction.

    h^k_t = h_t + silu(W_k h_t + b_k)        p_k(. | x_<=t) = the model's own head of words on h^k_t

A residual layer per head in front of the head of words, as Medusa has it: new ones are of zeros, so that each
head begins as the head of words. They are in float32 whatever the model's dtype. As layers of the model that
they are attached to, they train, move and are checkpointed with it; on disk they are a file of their own
beside the model's weights, which stay those of a plain causal LM.

Left out: whole transformer layers as heads, unembeddings of their own, and speculative decoding.

Shape legend: T positions, D hidden width, K heads.
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
from gyrocompass.loss.logprob import token_logprobs
from gyrocompass.loss.multi_token import later_target
from gyrocompass.loss.signal import Batch
from gyrocompass.model.head import BESIDE, causal_lm, find_head

FILE = "future_heads.safetensors"
_NAME = f"{BESIDE}future_heads"


def attach_future_heads(model: nn.Module, heads: int) -> nn.ModuleList:
    """The model's future heads; where it has none, new ones that repeat its head of words.

    Raises:
        BadInput: it has another number of them.
    """
    lm = causal_lm(model)
    if not hasattr(lm, _NAME):
        weight = find_head(model).w_VD
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        width = weight.shape[1]
        layers = nn.ModuleList(
            nn.Linear(width, width, device=weight.device, dtype=dtype) for _ in range(heads)
        )
        for parameter in layers.parameters():
            nn.init.zeros_(parameter)
        setattr(lm, _NAME, layers)
    found: nn.ModuleList = getattr(lm, _NAME)
    if len(found) != heads:
        raise BadInput(f"this model has {len(found)} future heads, not {heads}")
    return found


def future_logprobs(model: nn.Module, h_TD: Tensor, batch: Batch, *, backend: str = "auto") -> Tensor:
    """What each future head says of the token that it is to predict, [T, K]; 0 where there is none.

    Raises:
        BadInput: the model has no such heads.
    """
    layers = getattr(causal_lm(model), _NAME, None)
    if layers is None:
        raise BadInput(
            "this model has no future heads, and an objective reads them",
            fix="attach them first: gyrocompass.model.future_heads.attach_future_heads",
        )
    head = find_head(model)
    columns = []
    for steps, layer in enumerate(layers, start=1):
        with torch.autocast(h_TD.device.type, enabled=False):
            wide_TD = h_TD.to(layer.weight.dtype)
            ahead_TD = wide_TD + nn.functional.silu(layer(wide_TD))
        answer = token_logprobs(
            ahead_TD,
            head.w_VD,
            later_target(batch, steps),
            bias_V=head.bias_V,
            low_rank=head.low_rank_of(ahead_TD),
            softcap=head.softcap,
            logit_scale=head.logit_scale,
            want=(),
            backend=backend,
        )
        columns.append(answer.logprob_T)
    return torch.stack(columns, dim=1)


@contextmanager
def without_future_heads(model: nn.Module) -> Iterator[nn.ModuleList | None]:
    """The model as a plain causal LM meanwhile, for writing it; gives the heads that were taken off."""
    lm = causal_lm(model)
    layers: nn.ModuleList | None = getattr(lm, _NAME, None)
    if layers is not None:
        delattr(lm, _NAME)
    try:
        yield layers
    finally:
        if layers is not None:
            setattr(lm, _NAME, layers)


def save_future_heads(layers: nn.ModuleList, folder: Path) -> None:
    """Write heads beside their model's weights."""
    tensors = {name: x.detach().contiguous().cpu() for name, x in layers.state_dict().items()}
    save_file(tensors, folder / FILE)


def load_future_heads(model: nn.Module, folder: Path) -> None:
    """Attach the heads that stand in a model's folder, if there are some.

    Raises:
        BadInput: the file is damaged, or of another width.
    """
    path = folder / FILE
    if not path.is_file():
        return
    try:
        tensors = load_file(path)
        attach_future_heads(model, len(tensors) // 2).load_state_dict(tensors)
    except (SafetensorError, RuntimeError) as error:
        raise BadInput(f"these future heads cannot be read: {error}", where=path) from error
