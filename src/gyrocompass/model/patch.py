"""`patch(model)`: a Hugging Face causal LM computes its loss through the primitive, wherever it is trained.

    model(input_ids, labels=..., num_items_in_batch=...)  ->  .loss by token_logprobs, .logits when read

The patch is one attribute, `forward`, on the causal LM itself: no class is changed and no weight, so it saves
and reloads like any other, and it does not matter whether `peft`, `accelerate`, TRL or a `Trainer` wraps it
before or after. Asked for a loss, it runs the decoder and gives the hidden states to `token_logprobs`;
asked for anything else (no labels, `generate`, TRL's own `fused_lm_head=True`), it calls the forward it
replaced. The loss is that of `transformers`: labels shifted by one, -100 ignored, the sum divided by
`num_items_in_batch`, or without it the mean over the micro-batch. Three differences, all on purpose:

- it is float32 (float64 for a float64 model) from exact products of the inputs, where `transformers` rounds
  logits to the model's dtype;
- a batch without a target has loss 0 and zero gradients, not NaN;
- `logits` are a `LazyLogits`: nothing of [B, L, V] exists until somebody reads them.

Under an autocast the head is multiplied in the autocast's dtype, as it would be without the patch.

`torch.compile` compiles the decoder; the loss, a promise of logits beside it, comes after the graph.

Left out: `Trainer`'s `label_smoothing_factor`, which takes the labels away and asks for logits (right, but in
full); heads that are not one whole matrix, with or without plain LoRA beside it (a head cut over ranks,
DeepSpeed ZeRO-3); and a copy of a patched model, which is not patched until `patch` is called on it.

Shape legend: B rows of L positions, D hidden width, V vocabulary.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import (
    CausalLMOutputWithCrossAttentions,
    CausalLMOutputWithPast,
    MoeCausalLMOutputWithPast,
)

from gyrocompass.core.errors import BadInput
from gyrocompass.loss.logprob import token_logprobs
from gyrocompass.loss.signal import IGNORE_INDEX, TokenLogProbs
from gyrocompass.model.head import KNOWN, Head, causal_lm, find_head, model_type
from gyrocompass.model.lazy_logits import LazyLogits
from gyrocompass.model.probe import loss_refusal
from gyrocompass.model.trl_head import as_autocast, replace_trl_kernel, restore_trl_kernel

AnyModel = TypeVar("AnyModel", bound=nn.Module)

_BEFORE = "_forward_before_patch"
_patched: WeakSet[nn.Module] = WeakSet()
"""The causal LMs that compute their loss here."""


def patch(model: AnyModel) -> AnyModel:
    """Make a model compute its loss through `token_logprobs`; the model itself is changed.

    While any model is patched, TRL's trainers score every model they train through `token_logprobs` too
    (`trl_head.py`). Patching a patched model changes nothing.

    Args:
        model: a causal LM of `transformers`, or a `peft` model around one. Its architecture is in
            `head.KNOWN`, or it is asked, with a few tokens, whether it does anything to its head's output.

    Returns:
        The same model.

    Raises:
        BadInput: the architecture is not known and not plain, its head is not one matrix, or it has a loss
            of its own.
    """
    find_head(model)
    lm = causal_lm(model)
    if lm.loss_function is not ForCausalLMLoss:
        name = getattr(lm.loss_function, "__name__", lm.loss_function)
        raise BadInput(f"the model has a loss function of its own, {name}", fix="patch a model without one")
    against = None if model_type(model) in KNOWN else loss_refusal(lm)
    if against is not None:
        raise BadInput(
            f"cannot patch {model_type(model)!r}: {against}", fix="patch a model with the usual loss"
        )
    before = lm.forward
    buried = _BEFORE in vars(lm) and _function(before) is not type(lm).forward
    if not buried:  # neither outermost already, nor under what others have wrapped around it since
        setattr(lm, _BEFORE, before)
        lm.forward = MethodType(_ours(lm), lm)
    _patched.add(lm)
    replace_trl_kernel()
    return model


def unpatch(model: AnyModel) -> AnyModel:
    """Undo `patch`; a model that is not patched stays as it is.

    Returns:
        The same model.
    """
    lm = causal_lm(model)
    _patched.discard(lm)
    if _function(lm.forward) is _ours(lm):
        before = lm.__dict__.pop(_BEFORE)
        del lm.forward
        if before != lm.forward:
            lm.forward = before
    if not _patched:
        restore_trl_kernel()
    return model


def _ours(lm: Any) -> Callable[..., Any]:
    return _forward_of(type(lm))  # type: ignore[arg-type]  # a class is hashable


def _function(method: Any) -> Any:
    return getattr(method, "__func__", method)


@functools.cache
def _forward_of(architecture: type[nn.Module]) -> Callable[..., Any]:
    """The forward of a patched model: with the signature of its class, by which callers choose arguments.

    It is called `forward` so that pickle, which saves a method by its name, restores the class's own.
    """
    signature = inspect.signature(architecture.forward)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = dict(signature.bind(self, *args, **kwargs).arguments)
        given |= given.pop("kwargs", {})
        del given["self"]
        if self not in _patched or not _asks_for_loss(given):
            return getattr(self, _BEFORE)(*args, **kwargs)
        return _forward_with_loss(self, **given)

    forward.__signature__ = signature  # type: ignore[attr-defined]
    return forward


def _asks_for_loss(given: dict[str, Any]) -> bool:
    """Whether a call wants the loss over all positions, from this forward and not from TRL's around it, and
    nothing with it (a loss of a mixture's routing)."""
    keep = given.get("logits_to_keep", 0)
    everything = isinstance(keep, int) and keep == 0
    more = given.get("fused_lm_head", False) or given.get("output_router_logits", False)
    return given.get("labels") is not None and everything and not more


def _forward_with_loss(
    lm: Any,
    *,
    labels: Tensor,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = IGNORE_INDEX,
    return_dict: bool | None = None,
    logits_to_keep: int = 0,
    **inputs: Any,
) -> Any:
    """Decoder, loss, and an output of the kind that the architecture returns."""
    decoded = lm.base_model(**inputs, return_dict=True)
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    return _output(lm, decoded, shift_labels, ignore_index, num_items_in_batch, return_dict)


@torch.compiler.disable(reason="a patched model's logits are a promise, which no graph can hold")  # type: ignore[untyped-decorator]
def _output(
    lm: Any,
    decoded: Any,
    target_BL: Tensor,
    ignore_index: int,
    n_targets: Tensor | int | None,
    return_dict: bool | None,
) -> Any:
    """Loss and promised logits of decoded states; `torch.compile` ends its graph before it."""
    h_BLD, head = decoded.last_hidden_state, find_head(lm)
    if isinstance(head.w_VD, DTensor):
        raise BadInput("the head is cut over ranks", fix="keep it whole: leave lm_head out of fully_shard")
    low_rank = head.low_rank_of(h_BLD)
    if low_rank is not None:
        low_rank = as_autocast(*low_rank, None)[:2]
    h_BLD, w_VD, bias_V = as_autocast(h_BLD, head.w_VD, head.bias_V)
    head = head._replace(w_VD=w_VD, bias_V=bias_V)
    loss = _loss(h_BLD, low_rank, head, target_BL.to(h_BLD.device), ignore_index, n_targets)
    logits = LazyLogits.of(
        lambda: _logits(h_BLD, low_rank, head), (*h_BLD.shape[:-1], len(w_VD)), h_BLD.dtype, h_BLD.device
    )
    names = ("past_key_values", "hidden_states", "attentions", "cross_attentions")
    others = {name: getattr(decoded, name) for name in names if hasattr(decoded, name)}
    kind: Any = CausalLMOutputWithPast
    if hasattr(decoded, "cross_attentions"):
        kind = CausalLMOutputWithCrossAttentions
    elif hasattr(decoded, "router_logits"):
        kind = MoeCausalLMOutputWithPast
    output = kind(loss=loss, logits=logits, **others)
    as_dict = lm.config.return_dict if return_dict is None else return_dict
    return output if as_dict else output.to_tuple()


def _loss(
    h_BLD: Tensor,
    low_rank: tuple[Tensor, Tensor] | None,
    head: Head,
    target_BL: Tensor,
    ignore_index: int,
    n_targets: Tensor | int | None,
) -> Tensor:
    """The negative log-likelihood, summed and divided by the given number of targets or by their own."""
    n = (target_BL != ignore_index).sum() if n_targets is None else torch.as_tensor(n_targets)
    n = n.to(h_BLD.device).clamp(min=1)

    def mean(signal: TokenLogProbs) -> Tensor:
        return -signal.logprob_T.sum() / n

    signal = token_logprobs(
        h_BLD.flatten(0, 1),
        head.w_VD,
        target_BL.flatten(),
        bias_V=head.bias_V,
        low_rank=None if low_rank is None else (low_rank[0].flatten(0, 1), low_rank[1]),
        softcap=head.softcap,
        logit_scale=head.logit_scale,
        ignore_index=ignore_index,
        want=[],
        expect=mean,
    )
    return mean(signal)


def _logits(h_BLD: Tensor, low_rank: tuple[Tensor, Tensor] | None, head: Head) -> Tensor:
    """What the unpatched model would have returned."""
    logits_BLV = nn.functional.linear(h_BLD, head.w_VD, head.bias_V)
    if low_rank is not None:
        logits_BLV = (logits_BLV + nn.functional.linear(*low_rank)).to(logits_BLV.dtype)
    logits_BLV = logits_BLV * head.logit_scale
    if head.softcap is None:
        return logits_BLV
    return torch.tanh(logits_BLV / head.softcap) * head.softcap
