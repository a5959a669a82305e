"""Where each architecture keeps what the primitive needs: hidden states, head weight, bias, softcap, scale.

    logits = softcap * tanh((h w^T + bias) * logit_scale / softcap)

A causal model of `transformers` is a base model (tokens to hidden states, the final norm included) and a
linear head. What it does to the head's output differs, and is not visible in the weights; `KNOWN` states it
for each architecture, and a test compares each with the full model's logits. A model that is not in the table
is asked (`probe.py`): if nothing is done to its head's output it is taken, else it is refused, for a
forgotten softcap would give wrong numbers without any error.

Rows are packed, so attention must stay inside a segment. Where the segments fit into no more positions with
a row for each, which pairs do whose sides are of about one length, they are read that way: causal attention
needs no mask then, and a mask costs attention its fast path. Else nothing is passed but the positions:
`transformers` derives the block-causal (and sliding-window) mask from their restarts, for every attention
that takes a mask (`transformers.masking_utils.find_packed_sequence_indices`). A test holds both to that: a
packed sequence has the log-probabilities that it has alone. Models that are not in the table are asked too.

LoRA on the head stays two thin matrices A and B beside it: the primitive adds (scaling * h A^T) B^T to h w^T
and gives both their gradients, without the merged weight. Plain LoRA with one active adapter, that is; its
variants (DoRA and others) are refused.

Left out on purpose: architectures with more than one head.

Shape legend: B rows of L positions, T positions of the batch, S segments, D hidden width, V vocabulary,
R rank of LoRA.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gyrocompass.core.errors import BadInput, did_you_mean
from gyrocompass.loss.signal import Batch
from gyrocompass.model.probe import head_refusal, packing_refusal


class LowRank(NamedTuple):
    """LoRA on the head, as it is in training (with its dropout) or in evaluation."""

    a_RD: Tensor
    b_VR: Tensor
    scaling: float
    dropout: Callable[[Tensor], Tensor]


class Head(NamedTuple):
    """The last step of a model, as `token_logprobs` takes it."""

    w_VD: Tensor
    """The parameter itself: it may be tied, and it receives gradients."""
    bias_V: Tensor | None
    softcap: float | None
    logit_scale: float
    low_rank: LowRank | None = None

    def low_rank_of(self, h_TD: Tensor) -> tuple[Tensor, Tensor] | None:
        """What LoRA adds, if there is any: a [T, R] and b [V, R], as `token_logprobs` takes them."""
        if self.low_rank is None:
            return None
        a_RD, b_VR, scaling, dropout = self.low_rank
        return nn.functional.linear(dropout(h_TD.to(a_RD.dtype)), a_RD) * scaling, b_VR


class LogitRule(NamedTuple):
    """What an architecture does to its head's output: config -> number."""

    softcap: Callable[[Any], float | None] = lambda config: None
    logit_scale: Callable[[Any], float] = lambda config: 1.0


_PLAIN = LogitRule()
_SOFTCAP = LogitRule(softcap=lambda config: config.final_logit_softcapping)

KNOWN: Mapping[str, LogitRule] = {
    "cohere": LogitRule(logit_scale=lambda config: config.logit_scale),
    "gemma": _PLAIN,
    "gemma2": _SOFTCAP,
    "gemma3_text": _SOFTCAP,
    "gpt2": _PLAIN,
    "granite": LogitRule(logit_scale=lambda config: 1.0 / config.logits_scaling),
    "llama": _PLAIN,  # SmolLM and SmolLM2 too
    "mistral": _PLAIN,
    "qwen2": _PLAIN,
    "qwen3": _PLAIN,
    "smollm3": _PLAIN,
}
"""Architectures by `config.model_type`."""

BESIDE = "gyro_"
"""How the names of layers begin that stand beside a model's own: its scalar head, its future heads."""

ATTENTIONS = ("sdpa", "eager", "flex_attention")
"""Implementations of attention that take a mask, and so keep packed segments apart in any number of rows."""


def model_type(model: nn.Module) -> str:
    """The architecture's name, as in config.json."""
    return str(_config(model).model_type)


def context_length(model: nn.Module) -> int:
    """The longest sequence, in tokens, that the model has positions for."""
    return int(_config(model).max_position_embeddings)


def find_head(model: nn.Module) -> Head:
    """Find a model's head: its weight and bias, and what is done to its output.

    Raises:
        BadInput: the architecture is not known and does something to its head's output, or the head is not a
            plain linear layer, with or without plain LoRA beside it (it is quantised, trained whole as one of
            `modules_to_save`, or has DoRA).
    """
    name, lm = model_type(model), causal_lm(model)
    against = None if name in KNOWN else head_refusal(lm)
    if against is not None:
        raise BadInput(
            f"do not know where {name!r} keeps its head{did_you_mean(name, KNOWN)}; {against}",
            fix=f"known architectures: {', '.join(KNOWN)}",
        )
    head, low_rank = lm.get_output_embeddings(), None
    if has_lora(head):
        head, low_rank = head.base_layer, _low_rank(head)
    if type(head) is not nn.Linear:
        raise BadInput(
            f"the head is a {type(head).__module__}.{type(head).__name__}, not one matrix",
            fix="leave lm_head out of modules_to_save, and do not quantise it",
        )
    config, rule = lm.config, KNOWN.get(name, _PLAIN)
    return Head(head.weight, head.bias, rule.softcap(config), rule.logit_scale(config), low_rank)


def has_lora(layer: nn.Module) -> bool:
    """Whether a layer is a linear one of `peft` with LoRA beside it, active or not."""
    return (type(layer).__module__, type(layer).__name__) == ("peft.tuners.lora.layer", "Linear")


def _low_rank(layer: Any) -> LowRank | None:
    """The update that a LoRA layer adds now; None where it is switched off or merged into the weight."""
    if layer.merged and layer.disable_adapters:
        raise BadInput("LoRA on the head is merged and switched off at once", fix="unmerge it first")
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.merged or layer.disable_adapters or not active:
        return None
    if len(active) > 1:
        raise BadInput(
            f"{len(active)} adapters are active on the head: {', '.join(active)}", fix="choose one"
        )
    (name,) = active
    if name in layer.lora_variant or layer.lora_B[name].bias is not None:
        raise BadInput(
            "the head has a variant of LoRA (DoRA or another, or a bias of its own), not two matrices",
            fix="use plain LoRA on lm_head, or leave it out of target_modules",
        )
    a, b = layer.lora_A[name], layer.lora_B[name]
    return LowRank(a.weight, b.weight, float(layer.scaling[name]), layer.lora_dropout[name])


def is_tied(model: nn.Module) -> bool:
    """Whether the head's weight is the embedding of the input itself."""
    lm = causal_lm(model)
    weight: Tensor = lm.get_output_embeddings().weight
    return weight is lm.get_input_embeddings().weight


def hidden_states(model: nn.Module, batch: Batch) -> Tensor:
    """Hidden states after the final norm, [T, D], with attention inside segments.

    Gradients flow, and activation checkpointing does its work where it is enabled and the model is in
    training mode.

    Raises:
        BadInput: a segment is longer than the model has positions for, or the model's attention would not
            keep segments apart.
    """
    attention = _config(model)._attn_implementation
    if attention not in ATTENTIONS:
        raise BadInput(
            f"attention {attention!r} does not keep packed segments apart",
            fix=f"use one of {', '.join(ATTENTIONS)}",
        )
    against = None if model_type(model) in KNOWN else packing_refusal(causal_lm(model))
    if against is not None:
        raise BadInput(
            f"{model_type(model)!r} cannot be trained on packed rows: {against}",
            fix=f"known architectures: {', '.join(KNOWN)}",
        )
    context = context_length(model)
    if batch.length > context and int(batch.position_T.max()) >= context:
        longest = int(batch.position_T.max()) + 1
        raise BadInput(f"a segment of {longest} tokens is longer than the model's context of {context}")
    rows = _rows(batch)
    answer = causal_lm(model).base_model(
        input_ids=rows.token_BL,
        position_ids=rows.position_BL,
        use_cache=False,  # with a cache, no mask would be derived from positions
    )
    h_BLD: Tensor = answer.last_hidden_state
    h_TD = h_BLD.flatten(0, 1)
    return h_TD if rows.place_T is None else h_TD.index_select(0, rows.place_T)


class _Rows(NamedTuple):
    """A batch as the model reads it."""

    token_BL: Tensor
    position_BL: Tensor
    place_T: Tensor | None = None
    """Where each position of the batch went, flat; None: nowhere."""


def _rows(batch: Batch) -> _Rows:
    """A row for each segment, padded at its end to the longest, if that takes no more positions than the
    packed rows; else these. Padding of the batch is given the first position's hidden states."""
    packed = _Rows(batch.token_T.view(-1, batch.length), batch.position_T.view(-1, batch.length))
    own_T = batch.segment_T >= 0
    segments, longest = (
        int(column_T.masked_fill(~own_T, -1).max()) + 1 for column_T in (batch.segment_T, batch.position_T)
    )
    needed = segments * longest
    as_packed = longest == batch.length and bool(own_T.all())
    if as_packed or not 0 < needed <= len(own_T):
        return packed
    place_T = torch.where(own_T, batch.segment_T * longest + batch.position_T, 0)
    token_BL = batch.token_T.new_zeros(needed)
    token_BL[place_T[own_T]] = batch.token_T[own_T]
    position_L = torch.arange(longest, device=token_BL.device)
    token_BL = token_BL.view(-1, longest)
    return _Rows(token_BL, position_L.expand_as(token_BL), place_T)


def causal_lm(model: nn.Module) -> Any:
    """The model of `transformers` itself, out of the wrapper of `peft` if there is one."""
    wrapped: Any = model
    if not hasattr(model, "peft_config") or not hasattr(model, "get_base_model"):
        return wrapped
    if wrapped.active_peft_config.is_prompt_learning:
        raise BadInput("prompt tuning is not supported", fix="use LoRA")
    return wrapped.get_base_model()


def _config(model: nn.Module) -> Any:
    return causal_lm(model).config
