"""LoRA: a low-rank update beside frozen weights, through `peft`.

    W x  becomes  W x + (alpha / rank) B A x      A [rank, in] random, B [out, rank] zero: no change at first

An adapted model trains and scores like any other: `head.find_head` and `head.hidden_states` look through the
wrapper, on the head too (`lm_head` among the target modules; by default it is not). `load.save_model` writes
the merged model, `save_adapter` the update alone.

A head that is tied to the embedding may have an update, but cannot be merged: one weight stands for both, and
the embedding has no such update. Its adapter is saved alone.

Left out on purpose: `peft`'s other methods. `peft` is an extra: `pip install 'gyrocompass[lora]'`.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from gyrocompass.core.config import Config
from gyrocompass.core.errors import BadInput, MissingDependency
from gyrocompass.model.head import BESIDE, causal_lm, is_tied, model_type


class LoraSettings(Config):
    """What the update looks like and which layers get one."""

    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32.0, gt=0)
    """The update is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the update's inputs dropped in training."""
    target_modules: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Last parts of layer names, such as q_proj or lm_head; None: every linear layer but the head."""
    merge_on_save: bool = True
    """Whether a finished model is saved merged; else the adapter alone is."""


def apply_lora(model: nn.Module, settings: LoraSettings, *, seed: int) -> nn.Module:
    """Freeze a model and put a trainable low-rank update beside its layers; the model itself is changed.

    Args:
        model: as `load_causal_lm` or `new_causal_lm` gives it.
        settings: rank, scale, dropout and layers.
        seed: of the update's random half; the global random state is left as it was.

    Raises:
        MissingDependency: `peft` is not installed.
        BadInput: no layer of the model is called by any of `target_modules`, or one of them is a head that is
            tied to the embedding and the update is to be merged in the end.
    """
    peft = _peft()
    targets = None if settings.target_modules is None else list(settings.target_modules)
    if "lm_head" in (targets or ()) and is_tied(model) and settings.merge_on_save:
        raise _cannot_merge("target_modules")
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets or "all-linear",
        # GPT-2 keeps its weights transposed; told so, peft has no need to warn about it.
        fan_in_fan_out=model_type(model) == "gpt2",
        task_type="CAUSAL_LM",
    )
    try:
        with torch.random.fork_rng(devices=[]), _no_deprecations():
            torch.manual_seed(seed)
            adapted: nn.Module = peft.get_peft_model(model, config)
    except ValueError as error:
        raise BadInput(f"LoRA cannot be applied: {error}", where="target_modules") from error
    return adapted


def is_adapted(model: nn.Module) -> bool:
    """Whether the model carries LoRA."""
    return hasattr(model, "peft_config") and hasattr(model, "merge_and_unload")


def save_adapter(model: nn.Module, folder: Path) -> None:
    """Write an adapted model's update alone: adapter_config.json and adapter_model.safetensors."""
    assert is_adapted(model), "there is no adapter to save"
    adapted: Any = model
    adapted.save_pretrained(folder, save_embedding_layers=False)


def load_adapter(model: nn.Module, folder: Path, *, trainable: bool = False) -> nn.Module:
    """Put a saved update on its base model; the model itself is changed.

    Raises:
        MissingDependency: `peft` is not installed.
        BadInput: the folder holds no adapter, or a pickled one, or half of one, or one for another model.
    """
    peft = _peft()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise BadInput(f"no {name} here: not an adapter in safetensors", where=folder)
    try:
        with _no_deprecations():
            adapted: nn.Module = peft.PeftModel.from_pretrained(
                model, folder, is_trainable=trainable, local_files_only=True
            )
    except (RuntimeError, SafetensorError, ValueError) as error:
        raise BadInput(f"this adapter does not fit the model: {error}", where=folder) from error
    _check_whole(adapted, folder)
    return adapted


def _check_whole(adapted: nn.Module, folder: Path) -> None:
    """Refuse an adapter that lacks weights: `peft` leaves them as they were drawn, and warns."""
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        found = set(file.keys())
    expected = _peft().get_peft_model_state_dict(adapted, save_embedding_layers=False)
    if missing := sorted(set(expected) - found):
        raise BadInput(
            f"this adapter lacks {len(missing)} of {len(expected)} weights: {', '.join(missing[:3])}"
            + (", ..." if len(missing) > 3 else ""),
            where=folder,
            fix="fetch or write it again",
        )


def merged(model: nn.Module) -> nn.Module:
    """A copy of an adapted model with the update added to its weights and nothing left of the adapter.

    Raises:
        BadInput: head and embedding are one weight, and one of them has an update.
    """
    _check_ends(model)
    copied: Any = copy.deepcopy(model)
    plain: nn.Module = copied.merge_and_unload()
    return plain


@contextmanager
def without_lora(model: nn.Module) -> Iterator[None]:
    """The model as it was before it was adapted, meanwhile: its update is switched off.

    Afterwards the same parameters are trainable as before; `peft` by itself makes every update so.
    """
    adapted: Any = model
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with adapted.disable_adapter():
            yield
    finally:
        for parameter, trainable in before:
            parameter.requires_grad_(trainable)


def plain_weights(model: nn.Module, masters: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The weights of the plain language model that a model is now, one by one; LoRA is added in.

    Names are those of the model as it was before it was adapted; scalar and future heads are no part of it.

    Args:
        model: with or without LoRA.
        masters: wider copies of its parameters, by name, to be read instead of them, one at a time.

    Raises:
        BadInput: head and embedding are one weight, and one of them has an update.
    """
    lm = causal_lm(model)
    _check_ends(model)
    names = {id(p): name for name, p in model.named_parameters()}
    for name, parameter in lm.named_parameters():
        layer, adapted, key = name.rpartition(".base_layer.")
        if adapted:
            value = masters.get(names[id(parameter)], parameter)
            yield f"{layer}.{key}", _with_update(lm.get_submodule(layer), key, value)
        elif ".lora_" not in name and not name.startswith(BESIDE):
            yield name, masters.get(names[id(parameter)], parameter)


def _with_update(layer: Any, key: str, value: Tensor) -> Tensor:
    """A parameter of an adapted layer with what its active updates add to it now."""
    if key != "weight" or layer.merged or layer.disable_adapters:
        return value
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    with torch.no_grad():
        return sum((layer.get_delta_weight(name) for name in active), start=value)


def _check_ends(model: nn.Module) -> None:
    lm = causal_lm(model)
    ends = (lm.get_input_embeddings(), lm.get_output_embeddings())
    if is_tied(model) and any(hasattr(layer, "lora_A") for layer in ends):
        raise _cannot_merge(None)


def _cannot_merge(where: str | None) -> BadInput:
    return BadInput(
        "head and embedding are one weight (tied), so an update of one of them cannot be merged into it",
        where=where,
        fix="leave lm_head out of target_modules, or keep the adapter apart: merge_on_save: false",
    )


@contextmanager
def _no_deprecations() -> Iterator[None]:
    """Without `peft`'s warnings that users cannot act on, or that are raised as errors here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "Found missing adapter keys", UserWarning)
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to", UserWarning)
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`", UserWarning)
        yield


def _peft() -> ModuleType:
    try:
        import peft
    except ImportError as error:
        raise MissingDependency("peft", extra="lora", needed_for="LoRA") from error
    module: ModuleType = peft
    return module
