"""Where a run's windows come from: packed data in a fixed order, rollouts, or both in one window.

    Source --next--> Window (packed rows, and the documents they are of)
    data, rollouts --MixedSource--> windows with rows of each

The loop reads windows, asks nothing of how they are made, and keeps the source's state in every checkpoint: a
restored source goes on with the same windows.

In a window of both, each has its own share: `rows_per_step` rows of data, and all samples of a step. The
slices and sources of rollouts are then called `rollouts/...`, so that no sum anywhere adds tokens of texts
and tokens of samples, and every objective is about the slices of one of them (`Composite.within`).

Left out: shuffling and packing (`data`), and sampling from the model (`rollout.py`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from gyrocompass.core.config import config_hash
from gyrocompass.core.errors import BadInput
from gyrocompass.data.join import join, under
from gyrocompass.data.mixture import Sampler, SamplerConfig
from gyrocompass.data.pack import Packed
from gyrocompass.data.tokens import TokenDataset
from gyrocompass.loss.objective import Kind

ROLLOUTS = "rollouts"
"""What stands before the slices and sources of samples in a window that has data too."""


class Window(NamedTuple):
    """The rows of one optimizer step, the same on every rank, and the documents they were cut from."""

    packed: Packed
    data: TokenDataset


class Source(Protocol):
    """Yields windows until the data is over."""

    def next(self, step: int) -> Window | None:
        """The window of an optimizer step; None when the data is over."""

    def windows(self) -> int | None:
        """How many there are from the start to the end; None without an end."""

    def slices(self) -> Mapping[Kind, Sequence[str]]:
        """The names of the slices to come, by what they hold."""

    def state(self) -> dict[str, Any]:
        """The position, as JSON."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved position."""

    def fingerprint(self) -> str:
        """A hash of what a resume must find again and no state holds."""

    def metrics(self) -> Mapping[str, float]:
        """What is worth saying of the last window besides its losses."""


class PackedSource:
    """A dataset, packed and in the sampler's order."""

    def __init__(self, data: TokenDataset, config: SamplerConfig) -> None:
        self.data = data
        self.sampler = Sampler(data, config)

    def next(self, step: int) -> Window | None:
        """See `Source`."""
        packed = next(self.sampler, None)
        return None if packed is None else Window(packed, self.data)

    def windows(self) -> int | None:
        """See `Source`."""
        return self.sampler.windows()

    def slices(self) -> Mapping[Kind, Sequence[str]]:
        """See `Source`."""
        return {"data": self.data.slice_names}

    def state(self) -> dict[str, Any]:
        """See `Source`."""
        return self.sampler.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `Source`."""
        self.sampler.restore(state)

    def metrics(self) -> Mapping[str, float]:
        """Nothing."""
        return {}

    def fingerprint(self) -> str:
        """Of the tokens and all that objectives read of them."""
        return fingerprint(self.data)


class MixedSource:
    """Windows with rows of data and rollouts in them.

    Args:
        data: gives each window its rows of texts; the run is over when it is.
        rollouts: gives it all samples of a step.

    Raises:
        BadInput: a slice of the data is called as one of the rollouts is.
    """

    def __init__(self, data: PackedSource, rollouts: Source) -> None:
        self.data, self.rollouts = data, rollouts
        both = sorted(set(data.data.slice_names) & set(self.slices()["rollouts"]))
        if both:
            raise BadInput(
                f"the data has a slice {both[0]}, which is what samples of another are called",
                fix="call the slice of the data something else",
            )

    def next(self, step: int) -> Window | None:
        """See `Source`."""
        texts = self.data.next(step)
        samples = None if texts is None else self.rollouts.next(step)
        if texts is None or samples is None:
            return None
        return Window(*join([texts, (samples.packed, under(ROLLOUTS, samples.data))]))

    def windows(self) -> int | None:
        """See `Source`."""
        return self.data.windows()

    def slices(self) -> Mapping[Kind, Sequence[str]]:
        """See `Source`."""
        samples = self.rollouts.slices()["rollouts"]
        return {**self.data.slices(), "rollouts": [f"{ROLLOUTS}/{name}" for name in samples]}

    def state(self) -> dict[str, Any]:
        """Of both."""
        return {"data": self.data.state(), "rollouts": self.rollouts.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `Source`."""
        self.data.restore(state["data"])
        self.rollouts.restore(state["rollouts"])

    def metrics(self) -> Mapping[str, float]:
        """Of the rollouts."""
        return self.rollouts.metrics()

    def fingerprint(self) -> str:
        """Of both."""
        return config_hash([self.data.fingerprint(), self.rollouts.fingerprint()])


def fingerprint(data: TokenDataset) -> str:
    """A hash of a dataset's tokens, weights, columns and labels."""
    digest = hashlib.sha256()
    for column in (data.id_N, data.weight_N, data.offset_D):
        digest.update(np.ascontiguousarray(column).data)
    for name, values in [*data.columns.items(), *data.labels.items()]:
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()
