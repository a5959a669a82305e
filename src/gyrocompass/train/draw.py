"""Samples of held-out prompts, and how far each is from a reference: what watches and reports look at.

    prompts x seed --draw--> samples as rewards take them, and their tokens as a dataset
    tokens, log-probabilities of two models --sums--> distance of each sample, in nats

The seed of a sample depends on its place alone, so that every model asked with one seed is asked alike.

Shape legend: N tokens of a dataset, D documents (samples).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gyrocompass.data.tokens import TokenDataset
from gyrocompass.measure.reward import Sample
from gyrocompass.model.columns import FloatArray
from gyrocompass.train.answers import Prompt, as_sample, sample_row
from gyrocompass.train.rollout import Generate


class Drawn(NamedTuple):
    """What was written, sample by sample, those of a prompt side by side."""

    asked: list[Prompt]
    """The prompt of each sample."""
    samples: list[Sample]
    dataset: TokenDataset
    """A document each: prompt and completion, of which the completion counts."""


def draw(
    prompts: Sequence[Prompt],
    samples_per_prompt: int,
    seed: int,
    generate: Generate,
    decode: Callable[[Sequence[int]], str],
) -> Drawn:
    """Sample every prompt.

    Args:
        prompts: what to go on from.
        samples_per_prompt: 1 or more.
        seed: of all draws.
        generate: the engine.
        decode: token ids to the text that is rewarded.
    """
    asked = [prompt for prompt in prompts for _ in range(samples_per_prompt)]
    seeds = [seed * 1_000_003 + number for number in range(len(asked))]
    sampled = generate([prompt.ids for prompt in asked], seeds)
    samples = [as_sample(p, one, decode) for p, one in zip(asked, sampled, strict=True)]
    dataset = TokenDataset.of(
        sample_row(f"{prompt.id}@{number}", prompt, one.token_ids)
        for number, (prompt, one) in enumerate(zip(asked, sampled, strict=True))
    )
    return Drawn(asked, samples, dataset)


def sums(dataset: TokenDataset, values_N: FloatArray) -> NDArray[np.float64]:
    """The sum of values over the counted tokens of each document, [D]; other tokens may have a NaN."""
    counted_N = np.where(dataset.weight_N > 0, values_N, 0).astype(np.float64)
    return np.add.reduceat(counted_N, dataset.offset_D[:-1])
