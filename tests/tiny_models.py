"""Models of every known architecture, small enough to run in a millisecond, and batches for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from gyrocompass.data.pack import assemble, cut, pack
from gyrocompass.data.tokens import TokenDataset, TokenRow
from gyrocompass.loss.signal import Batch
from gyrocompass.model.batch import to_batch
from gyrocompass.model.load import new_causal_lm

VOCABULARY = 48
WINDOW = 5
"""The sliding window of those that have one: shorter than the test's documents."""

_ROPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama_tied": {"model_type": "llama", "tie_word_embeddings": True},
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    },
    "qwen3": {"head_dim": 8},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": WINDOW, "final_logit_softcapping": 3.0},
    "gemma3_text": {"head_dim": 8, "sliding_window": WINDOW, "final_logit_softcapping": 2.0},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
    "gpt2": {
        "vocab_size": VOCABULARY,
        "n_embd": 16,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 64,
        "initializer_range": 0.5,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
}


def tiny(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    own = ARCHITECTURES[name]
    base = {} if name == "gpt2" else _ROPE
    return new_causal_lm({"model_type": name, **base, **own, **changes}, seed=seed, dtype=dtype)


def random_documents(seed: int, lengths: Sequence[int]) -> TokenDataset:
    random = np.random.default_rng(seed)
    rows = [
        TokenRow(
            f"document-{index}",
            ["code", "prose"][index % 2],
            "test",
            random.integers(1, VOCABULARY, length),
            random.integers(0, 4, length),
            random.integers(0, 2, length) if index % 3 == 2 else np.ones(length),
        )
        for index, length in enumerate(lengths)
    ]
    return TokenDataset.of(rows)


def packed_batch(dataset: TokenDataset, length: int) -> Batch:
    pieces = cut(dataset, length)
    return to_batch(assemble(dataset, pieces, pack(pieces.length_P, length), length))
