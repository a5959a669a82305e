"""Models from folders and to folders: safetensors only, offline, and complete or not at all.

    folder (config.json, *.safetensors) --load_causal_lm--> model
    architecture, seed -----------------new_causal_lm-----> model
    model -------------------------------save_model-------> folder

`transformers` does the work; what stands here is what it is lenient about. It would fetch a name that is no
folder, read a pickle, fill weights that the files lack with random numbers and skip those it has no place
for, each with a warning at most. Here each is an error (law 7: nothing executes; law 6: a half-loaded model's
numbers are not that model's).

Left out on purpose: downloading, remote code, quantised weights, and any attention that is not one of
`ATTENTIONS`, because only those are known to keep packed segments apart (see `head.hidden_states`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from gyrocompass.core.errors import BadInput, did_you_mean
from gyrocompass.model.future_heads import FILE as FUTURE_HEADS
from gyrocompass.model.future_heads import load_future_heads, save_future_heads, without_future_heads
from gyrocompass.model.head import ATTENTIONS
from gyrocompass.model.lean_norm import make_lean
from gyrocompass.model.lora import is_adapted, merged
from gyrocompass.model.scalar_head import FILE as SCALAR_HEAD
from gyrocompass.model.scalar_head import load_scalar_head, save_scalar_head, without_scalar_head
from gyrocompass.model.wide_linear import widen_where_narrow_is_slow

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_LEGACY_KEYS = frozenset({"model_type", "rope_theta", "rope_scaling"})


def load_causal_lm(
    path: Path | str, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> nn.Module:
    """Load a causal language model from a folder in Hugging Face format, in evaluation mode.

    Args:
        path: a folder with config.json and safetensors. A name on a hub is not looked up.
        dtype: of the weights; None keeps the one they were saved in.
        device: where the model is to be.

    Raises:
        BadInput: what stands at `path` is not a folder, not a model, or not a whole one: pickles and no
            safetensors, a damaged file, weights that are missing, left over or of another shape, an
            architecture unknown to `transformers` or one that needs code from the folder.
    """
    folder = Path(path)
    config = _read_config(folder)
    _check_weight_files(folder)
    with quiet():
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype or "auto",
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # so that all of them are reported, by us
            output_loading_info=True,
        )
    _check_complete(folder, report)
    loaded: nn.Module = model.to(device)
    load_scalar_head(loaded, folder)
    load_future_heads(loaded, folder)
    make_lean(loaded)
    widen_where_narrow_is_slow(loaded)
    return loaded.eval()


def new_causal_lm(
    architecture: Mapping[str, Any], *, seed: int, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """Make a causal language model with random weights, in evaluation mode, on the CPU.

    The same architecture, seed and version of torch give the same weights; the global random state is left
    as it was.

    Args:
        architecture: the fields of a `transformers` config, with its `model_type`.
        seed: of the initial weights.
        dtype: of the weights; they are drawn in float32 and rounded.

    Raises:
        BadInput: no or an unknown model_type, an unknown field (the nearest known one is named), or values
            that do not fit together.

    >>> model = new_causal_lm({"model_type": "llama", "vocab_size": 32, "hidden_size": 8,
    ...     "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}, seed=0)
    >>> sum(parameter.numel() for parameter in model.parameters())
    1176
    """
    fields = dict(architecture)
    config_class = _config_class(fields, where="architecture")
    known = set(config_class().to_dict()) | set(config_class.attribute_map) | _LEGACY_KEYS
    for key in fields:
        if key not in known:
            fields_of = f"{fields['model_type']!r} has no field {key!r}"
            raise BadInput(f"{fields_of}{did_you_mean(key, known)}", where="architecture")
    try:
        config = config_class(**{key: value for key, value in fields.items() if key != "model_type"})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise BadInput(f"this architecture cannot be built: {error}", where="architecture") from error
    make_lean(model)
    widen_where_narrow_is_slow(model)
    return model.to(dtype).eval()


def save_model(model: nn.Module, folder: Path, tokenizer: Any = None) -> None:
    """Write a model as safetensors with its config, and its tokenizer when given; a reload is bit-equal.

    Tied weights are written once and tied again on loading. A model with LoRA is written with its update
    merged into the weights (rounded to their dtype), and stays as it is itself; `lora.save_adapter` writes
    the update alone. Scalar and future heads are written beside them.
    """
    with without_scalar_head(model) as head, without_future_heads(model) as ahead, quiet():
        whole: Any = merged(model) if is_adapted(model) else model
        whole.save_pretrained(folder)
    if head is not None:
        save_scalar_head(head, folder)
    if ahead is not None:
        save_future_heads(ahead, folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _read_config(folder: Path) -> Any:
    """The folder's config, if it is one that can be built without running or fetching anything."""
    if not folder.is_dir():
        raise BadInput(
            f"no such folder: {folder}",
            fix="models are read from folders; fetch one first, for instance with "
            "`hf download NAME --local-dir FOLDER`",
        )
    if (folder / "adapter_config.json").exists():
        raise BadInput(
            "this folder holds an adapter",
            where=folder,
            fix="load its base model and put it on top with `load_adapter`, or merge the two into a folder",
        )
    path = folder / "config.json"
    try:
        fields = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise BadInput("no config.json here: not a model", where=folder) from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadInput(f"not valid JSON: {error}", where=path) from error
    if not isinstance(fields, dict):
        raise BadInput("a config is a JSON object", where=path)
    config_class = _config_class(fields, where=path)
    if config_class not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise BadInput(f"{fields['model_type']!r} is not a causal language model", where=path)
    if "quantization_config" in fields:
        raise BadInput("quantised weights are not supported", where=path, fix="use the unquantised model")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise BadInput(f"this config cannot be read: {error}", where=path) from error
    if config._attn_implementation not in (None, *ATTENTIONS):
        raise BadInput(
            f"the config asks for attention {config._attn_implementation!r}",
            where=path,
            fix=f"remove the entry; one of {', '.join(ATTENTIONS)} is used",
        )
    return config


def _config_class(fields: Mapping[str, Any], where: Path | str) -> Any:
    """The class of a config by its model_type."""
    name = fields.get("model_type")
    if not isinstance(name, str):
        raise BadInput(
            "no model_type", where=where, fix="name the architecture, for instance model_type: llama"
        )
    if name in CONFIG_MAPPING:
        return CONFIG_MAPPING[name]
    if "auto_map" in fields:
        raise BadInput(
            f"{name!r} is defined by code that comes with the model, and such code is never run",
            where=where,
            fix="use a version of the model that `transformers` itself implements",
        )
    raise BadInput(f"unknown model_type {name!r}{did_you_mean(name, CONFIG_MAPPING.keys())}", where=where)


def _check_weight_files(folder: Path) -> None:
    """Refuse pickles, and safetensors files that are absent or cut short."""
    paths = sorted(
        path for path in folder.glob("*.safetensors") if path.name not in (SCALAR_HEAD, FUTURE_HEADS)
    )
    if not paths:
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        if pickles:
            raise BadInput(
                f"the weights are pickles ({', '.join(pickles[:3])}), which can run code and are never read",
                where=folder,
                fix="convert them in a place you trust: load with `transformers`, then "
                "`save_pretrained(FOLDER)` writes safetensors",
            )
        raise BadInput("no *.safetensors here: a config without weights", where=folder)
    index = folder / "model.safetensors.index.json"
    if index.exists() and not (folder / "model.safetensors").exists():
        try:
            shards = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise BadInput("not an index of weights", where=index) from error
        if missing := sorted(shards - {path.name for path in paths}):
            raise BadInput(f"weights are missing: {', '.join(missing)}", where=folder)
    for path in paths:
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise BadInput(
                f"damaged safetensors: {error}", where=path, fix="fetch or write it again"
            ) from error


def _check_complete(folder: Path, report: Mapping[str, Any]) -> None:
    """Refuse a model that has random weights in it, or weights that it has no place for."""
    mismatched = [f"{name} {list(there)} for {list(ours)}" for name, there, ours in report["mismatched_keys"]]
    problems = {
        "missing": sorted(report["missing_keys"]),
        "without a place in the model": sorted(report["unexpected_keys"]),
        "of another shape": sorted(mismatched),
        "not converted": [str(message) for message in report["error_msgs"]],
    }
    lines = [
        f"{len(names)} {what}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        for what, names in problems.items()
        if names
    ]
    if lines:
        raise BadInput(
            "the weights do not fit the config: " + "; ".join(lines),
            where=folder,
            fix="config.json and the weights must be of one model",
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Without the bars and warnings of `transformers`: what matters in them is raised instead."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
