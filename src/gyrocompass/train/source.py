"""Where a run's windows come from: packed data in a fixed order, or whatever else yields windows.

    Source --next--> Window (packed rows, and the documents they are of)

The loop reads windows, asks nothing of how they are made, and keeps the source's state in every checkpoint: a
restored source goes on with the same windows.

Left out: shuffling and packing (`data`), and sampling from the model (`rollout.py`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from gyrocompass.data.mixture import Sampler, SamplerConfig
from gyrocompass.data.pack import Packed
from gyrocompass.data.tokens import TokenDataset


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


def fingerprint(data: TokenDataset) -> str:
    """A hash of a dataset's tokens, weights, columns and labels."""
    digest = hashlib.sha256()
    for column in (data.id_N, data.weight_N, data.offset_D):
        digest.update(np.ascontiguousarray(column).data)
    for name, values in [*data.columns.items(), *data.labels.items()]:
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()
