"""What `gyro verify` looks at: a training stage before it has run, with its data and its untrained model.

A check takes a `Subject` and answers with a `Finding`. Where a stage computes in 16 bits, rounding hides
small faults, so checks of exactness are made in float32 as well: `Subject.numerics` holds the arithmetics to
check in, the exact one first.

Bounds are relative. For log-probabilities to the largest of 1, the log-normaliser and the logit, since a
log-probability is the difference of these two and inherits their rounding; for a gradient to its norm.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from gyrocompass.core.artifact import Artifact
from gyrocompass.core.progress import Progress
from gyrocompass.core.store import Store
from gyrocompass.data.mixture import Sampler
from gyrocompass.data.pack import Int64Array, Packed
from gyrocompass.data.tokens import TokenDataset
from gyrocompass.model.fit import check_fit
from gyrocompass.recipe.stages.train import TrainStage
from gyrocompass.train.config import PRECISIONS, TrainConfig
from gyrocompass.train.optim import MainParameters
from gyrocompass.train.reference import LiveReference

BOUNDS = {"float64": 1e-10, "float32": 1e-5, "bf16": 2e-2, "bf16_autocast": 2e-2}
"""The largest relative difference between two ways of splitting the same tokens, by precision.

For bf16 five roundings of 2^-8; a sound stage stays below 1e-3 (log-probabilities) and 6e-3 (gradients).
"""

_CHECKED_IN = {
    "float64": ("float64",),
    "float32": ("float32",),
    "bf16": ("float32", "bf16"),
    "bf16_autocast": ("float32", "bf16_autocast"),
}


class Finding(NamedTuple):
    """What a check found."""

    passed: bool | None
    """None: there is nothing to check in this stage."""
    measured: str
    bound: str
    over: str = ""
    """What was measured: how much of what."""
    look_at: str = ""
    """Where to begin when it failed."""


@dataclass(frozen=True)
class Numeric:
    """The stage's model in one arithmetic."""

    config: TrainConfig
    """The stage's, with the precision that is checked in."""
    model: nn.Module
    main: MainParameters
    reference: LiveReference | None

    @property
    def autocast(self) -> bool:
        """Whether forward passes run under bf16 autocast."""
        return self.config.precision == "bf16_autocast"


@dataclass(frozen=True)
class Subject:
    """A training stage with what it reads, before its first step."""

    name: str
    stage: TrainStage
    model: Artifact
    """The model that its chain of training stages begins with."""
    data_artifact: Artifact
    held_out: Artifact | None
    reference: Path | None
    """The folder of the reference that it asks while training, if that is another model."""
    learned_before: tuple[Artifact, ...]
    """The data of the training stages that it goes on from."""
    store: Store
    progress: Progress
    device: torch.device

    @cached_property
    def config(self) -> TrainConfig:
        """The stage's part that the training loop reads."""
        return TrainConfig.model_validate(self.stage.model_dump(include=set(TrainConfig.model_fields)))

    @cached_property
    def data(self) -> TokenDataset:
        """What it trains on."""
        return TokenDataset.open(self.data_artifact.path)

    @cached_property
    def window(self) -> Packed:
        """The data of its first step."""
        return next(self.windows())

    def windows(self) -> Iterator[Packed]:
        """Its windows, from the first."""
        return Sampler(self.data, self.config.sampler())

    @cached_property
    def numerics(self) -> tuple[Numeric, ...]:
        """The arithmetics that checks run in, the exact one first.

        Raises:
            BadInput: the tokens were not made for this model.
        """
        model = self.stage.trainable_model(self.model.path, self.device)
        check_fit(model, self.data, self.config.sequence_length, f"stages.{self.name}")
        found = []
        for precision in _CHECKED_IN[self.stage.precision]:
            # A copy before `MainParameters`, which hooks into 16-bit parameters.
            rounded = precision == self.stage.precision or PRECISIONS[self.stage.precision] == torch.float32
            own = model if rounded else copy.deepcopy(model).to(PRECISIONS[precision])
            config = self.config.model_copy(update={"precision": precision})
            reference = self.stage.live_reference(own, self.reference, self.device, precision)
            found.append(Numeric(config, own, MainParameters(own), reference))
        return tuple(found)


Check = Callable[[Subject], Finding]


def segments(packed: Packed) -> Iterator[Int64Array]:
    """The positions of each segment of a batch, in order; padding is none."""
    for segment in range(int(packed.segment_T.max()) + 1):
        yield np.flatnonzero(packed.segment_T == segment)


def alone(packed: Packed, position_S: Int64Array) -> Packed:
    """One segment as a batch of its own: a row without padding or neighbours."""
    part = packed.at(position_S, len(position_S))
    return part._replace(segment_T=np.zeros_like(part.segment_T))
