"""A tiny training run as a program, for tests that kill it or start it on several ranks.

    main([FOLDER, CONFIG_JSON, "--kill-at-sync", N])       or --kill-at-step N, --live-reference

Trains a tiny Llama on made-up documents, on as many ranks as `torchrun` says, and writes everything that a
resume must reproduce to FOLDER/result.safetensors and FOLDER/ledger.parquet. The kill options make the
process send itself SIGKILL: at its Nth fsync (that is, while a checkpoint is being written), or before its
Nth optimizer step.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from gyrocompass.data.tokens import TokenDataset, TokenRow
from gyrocompass.model.load import new_causal_lm
from gyrocompass.model.score import score_dataset
from gyrocompass.train.checkpoint import steps_on_disk
from gyrocompass.train.config import PRECISIONS, TrainConfig
from gyrocompass.train.distributed import world_from_environment
from gyrocompass.train.loop import train
from gyrocompass.train.optim import AdamW
from gyrocompass.train.reference import LiveReference

VOCABULARY = 48
ARCHITECTURE = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "attention_dropout": 0.1,  # so that the random state matters
}


def tiny_data(documents: int = 40, seed: int = 0) -> TokenDataset:
    """Documents of unequal length, masks, weights and a reference, in two slices and two sources."""
    rng, other = np.random.default_rng(seed), np.random.default_rng(seed + 1)
    rows = []
    for number in range(documents):
        n_tokens = int(rng.integers(3, 60))
        weights = rng.choice([0.0, 0.5, 1.0, 2.0], n_tokens)
        weights[-1] = 1.0
        ids = (np.arange(n_tokens) * (1 + number % 3) + number) % VOCABULARY
        names = (f"document-{number}", f"slice-{number % 2}", f"source-{number % 3 // 2}")
        byte_counts = rng.integers(0, 5, n_tokens).tolist()
        columns = {"reference_logprob": -3.0 - (number % 2) * other.random(n_tokens)}
        rows.append(TokenRow(*names, ids.tolist(), byte_counts, weights.tolist(), columns=columns))
    return TokenDataset.of(rows)


def tiny_model(config: TrainConfig, *, dropout: bool = True, seed: int = 0) -> torch.nn.Module:
    """A tiny Llama, the same every time."""
    architecture = ARCHITECTURE | ({} if dropout else {"attention_dropout": 0.0})
    return new_causal_lm(architecture, seed=seed).to(PRECISIONS[config.precision])


def without_columns(data: TokenDataset) -> TokenDataset:
    """The same data, of which no reference has said anything."""
    return dataclasses.replace(data, columns={})


def tiny_reference(config: TrainConfig) -> LiveReference:
    """Another tiny Llama, which follows as the config says."""
    return LiveReference(tiny_model(config, seed=1), update=config.reference_update)


def _kill_at(call: int, owner: object, name: str) -> None:
    """Make the `call`th call of a function the last thing this process does."""
    before, calls = getattr(owner, name), [0]

    def counted(*arguments: object, **keywords: object) -> object:
        calls[0] += 1
        if calls[0] == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return before(*arguments, **keywords)

    setattr(owner, name, counted)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("config")
    parser.add_argument("--kill-at-sync", type=int)
    parser.add_argument("--kill-at-step", type=int)
    parser.add_argument("--no-dropout", action="store_true")
    parser.add_argument("--live-reference", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    config = TrainConfig.model_validate(json.loads(options.config))
    if options.kill_at_sync:
        _kill_at(options.kill_at_sync, os, "fsync")
    if options.kill_at_step:
        _kill_at(options.kill_at_step, AdamW, "step")
    model = tiny_model(config, dropout=not options.no_dropout)
    data, reference = tiny_data(), None
    if options.live_reference:
        data, reference = without_columns(data), tiny_reference(config)

    with world_from_environment(torch.device("cpu")) as world:
        outcome = train(
            model,
            data,
            config,
            options.folder / "run",
            world=world,
            reference=reference,
            evaluate=lambda: score_dataset(model, data, length=config.sequence_length),
        )
        if not world.is_first:
            return
        newest = steps_on_disk(options.folder / "run")[-1]
        tensors = {name: p.detach().contiguous() for name, p in model.named_parameters()}
        save_file(tensors, options.folder / "result.safetensors")
        for name in ("optimizer.safetensors", "rng.safetensors", "ledger.parquet", "state.json"):
            (options.folder / name).write_bytes((newest / name).read_bytes())
        assert outcome.ledger.total.count > 0


if __name__ == "__main__":
    main(sys.argv[1:])
