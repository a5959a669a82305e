"""A tiny run on data and rollouts together, as a program, for tests that kill it or start it on two ranks.

    main([FOLDER, CONFIG_JSON, "--kill-at-step", N])

The data is that of `tiny_run`, whose slices the prompts share by name; its column is the reference. Samples
are the model's own, rewarded for a token. Results are written as `tiny_run` writes them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import tiny_run
import torch
from safetensors.torch import save_file

from gyrocompass.measure.reward import Part, Sample, WeightedSum
from gyrocompass.model.columns import score_logprobs
from gyrocompass.model.sampler import Sampled, Sampling, sample
from gyrocompass.train.answers import Prompt
from gyrocompass.train.checkpoint import steps_on_disk
from gyrocompass.train.config import TrainConfig
from gyrocompass.train.distributed import World, world_from_environment
from gyrocompass.train.loop import train
from gyrocompass.train.optim import AdamW
from gyrocompass.train.rollout import Generate, RolloutConfig, RolloutSource
from gyrocompass.train.source import MixedSource, PackedSource

WANTED, END, LENGTH, NEW = 5, 0, 32, 8
PROMPTS = [Prompt(f"p{n}", f"slice-{n % 2}", "source-0", f"{n}", (n + 1, 7), {}) for n in range(6)]
OBJECTIVE: list[Any] = [
    {"clipped_surrogate": {"of": "rollouts"}},
    {"reference_kl": {"of": "rollouts", "weight": 0.1}},
    {"excess_nll": {"name": "prose", "of": "data", "slices": ["slice-0"]}},
    {"z_loss": {"of": "data", "coefficient": 1e-2, "weight": 0.5}},
]
BLEND = {"lagrangian": {"objective": "prose", "bound": 0.02, "rate": 0.3, "initial": 0.5}}


class Share:
    """The share of a sample's tokens that are one token; as text, tokens are numbers with spaces."""

    name, low, high = "wanted", 0.0, 1.0

    def __call__(self, samples: Sequence[Sample], /) -> list[float]:
        written = [sample.completion.split() for sample in samples]
        return [words.count(str(WANTED)) / max(1, len(words)) for words in written]


def decode(ids: Sequence[int]) -> str:
    return " ".join(map(str, ids))


def own_samples(
    model: torch.nn.Module, prompts: Sequence[Sequence[int]], seeds: Sequence[int]
) -> list[Sampled]:
    return sample(model, prompts, seeds, Sampling(NEW, (END,)), slots=8)


def rollouts_of(generate: Generate, *, world: World = World(), **changes: Any) -> RolloutSource:  # noqa: B008
    more = {name: changes.pop(name) for name in ("reference", "served") if name in changes}
    settings = {"prompts_per_step": 4, "samples_per_prompt": 4, "max_new_tokens": NEW, **changes}
    config, reward = RolloutConfig.model_validate(settings), WeightedSum((Part(Share()),))
    return RolloutSource(PROMPTS, generate, decode, reward, config, LENGTH, world=world, **more)


def mixed(
    model: torch.nn.Module,
    settings: TrainConfig,
    world: World = World(),  # noqa: B008
    **changes: Any,
) -> MixedSource:
    """Texts and the model's own samples."""
    first = tiny_run.tiny_model(settings, dropout=False)
    reference = partial(score_logprobs, first, LENGTH, 8)
    generate = changes.pop("generate", partial(own_samples, model))
    rollouts = rollouts_of(generate, world=world, reference=reference, **changes)
    return MixedSource(PackedSource(tiny_run.tiny_data(), settings.sampler()), rollouts)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("config")
    parser.add_argument("--kill-at-step", type=int)
    parser.add_argument("--ahead", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    config = TrainConfig.model_validate(json.loads(options.config))
    if options.kill_at_step:
        tiny_run._kill_at(options.kill_at_step, AdamW, "step")
    model = tiny_run.tiny_model(config, dropout=False)
    with world_from_environment(torch.device("cpu")) as world:
        source = mixed(model, config, world, ahead_steps=options.ahead)
        train(model, source, config, options.folder / "run", world=world)
        if not world.is_first:
            return
        newest = steps_on_disk(options.folder / "run")[-1]
        tensors = {name: p.detach().contiguous() for name, p in model.named_parameters()}
        save_file(tensors, options.folder / "result.safetensors")
        for name in ("optimizer.safetensors", "rng.safetensors", "ledger.parquet", "state.json"):
            (options.folder / name).write_bytes((newest / name).read_bytes())
