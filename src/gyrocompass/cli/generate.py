"""`gyro generate`: completions of prompts, each token with its log-probability."""

from __future__ import annotations

import argparse
import json

import torch
from rich.console import Console

from gyrocompass.cli.model import model_folder
from gyrocompass.core.config import parse
from gyrocompass.core.errors import BadInput
from gyrocompass.data.tokenizer import load_tokenizer
from gyrocompass.model.decoding import Decoding
from gyrocompass.model.generate import generate as complete
from gyrocompass.model.open import open_model


def generate(options: argparse.Namespace) -> int:
    """Print each completion with its mean log-probability, or JSON with every token's."""
    folder = model_folder(options)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    decoding = _decoding(options)
    completions = complete(
        open_model(folder, dtype=None, device=device),
        load_tokenizer(folder),
        options.prompt,
        chat=options.chat,
        max_new_tokens=options.max_new_tokens,
        decoding=decoding,
        alternatives=options.alternatives,
        seed=options.seed,
    )
    if options.json:
        print(json.dumps([completion._asdict() for completion in completions], indent=2, allow_nan=False))
        return 0
    console = Console(highlight=False, markup=False)
    for completion in completions:
        console.print(completion.prompt, style="dim")
        console.print(completion.text)
        n_tokens = len(completion.logprobs)
        mean = -sum(completion.logprobs) / n_tokens
        console.print(
            f"-- {n_tokens} tokens, {mean:.3f} nats per token, ended by {completion.finish}\n", style="dim"
        )
    return 0


def _decoding(options: argparse.Namespace) -> Decoding:
    """What was asked for, checked.

    Raises:
        ConfigError: controls that do not go together.
        BadInput: the schema cannot be read.
    """
    given = {name: getattr(options, name) for name in Decoding.model_fields if name != "json_schema"}
    if options.json_schema is not None:
        try:
            given["json_schema"] = json.loads(options.json_schema.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BadInput(f"the schema cannot be read: {error}", where=options.json_schema) from error
    return parse(Decoding, given, "gyro generate")
