"""Model artifacts as they are opened: the folder of a model, with what was saved beside its weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from gyrocompass.model.load import load_causal_lm
from gyrocompass.model.lora import load_adapter, merged

ADAPTER = "adapter"
"""The folder of an unmerged LoRA adapter within a model artifact."""


def open_model(folder: Path, *, dtype: torch.dtype | None, device: torch.device) -> nn.Module:
    """Load a model artifact; a LoRA adapter that was saved beside the weights is merged in."""
    model = load_causal_lm(folder, dtype=dtype, device=device)
    return merged(load_adapter(model, folder / ADAPTER)) if (folder / ADAPTER).is_dir() else model
