"""In what order a run meets its data: easy pieces before hard ones, or slices whose shares move.

    curriculum: {by: length, parts: 10}
    curriculum: {by: reference_loss, epochs: 2}
    curriculum: {slices: {to: {prose: 0.2, code: 0.8}, steps: 1000}}    from `slice_weights`, or from sizes

By difficulty: in its first epochs each slice gives its bundles in parts of rising difficulty, shuffled within
a part. An epoch still holds each piece exactly once. By slices: the shares go from one mixture to another
linearly in the input tokens drawn, a step counting for a window of full rows. Both leave the sampler's
position the few integers that it is.

Left out: orders that depend on the model in training (its state is no function of the position).

Shape legend: N tokens of the dataset, P pieces, B bundles, S slices.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import NonNegativeFloat, PositiveInt, model_validator

from gyrocompass.core.config import Config
from gyrocompass.core.errors import BadInput
from gyrocompass.data.pack import Int64Array, Pieces
from gyrocompass.data.tokens import TokenDataset

Float64Array = npt.NDArray[np.float64]

REFERENCE = "reference_logprob"
"""The column with log p of each token under the reference."""


class SliceRamp(Config):
    """From the run's first slice weights to others, linearly; they stay there after."""

    to: dict[str, NonNegativeFloat]
    steps: PositiveInt


class CurriculumConfig(Config):
    """See the module docstring.

    Args:
        by: what makes a bundle hard: the inputs of its documents, or their mean NLL under the reference.
        parts: into how many parts of rising difficulty a slice is cut.
        epochs: how many epochs are ordered; those after are shuffled whole.
        slices: the mixture at the end.
    """

    by: Literal["length", "reference_loss"] | None = None
    parts: PositiveInt = 10
    epochs: PositiveInt = 1
    slices: SliceRamp | None = None

    @model_validator(mode="after")
    def _says_something(self) -> CurriculumConfig:
        if self.by is None and self.slices is None:
            raise ValueError("a curriculum is by difficulty (`by`), by `slices`, or both")
        return self


def difficulty(by: str, dataset: TokenDataset, pieces: Pieces, bundles: Int64Array) -> Float64Array:
    """How hard each bundle is, [B].

    Raises:
        BadInput: the data does not have the reference's log-probabilities.
    """
    first_B = bundles[:-1]
    if by == "length":
        input_D = np.diff(dataset.offset_D) - 1
        whole: Float64Array = np.add.reduceat(input_D[pieces.document_P], first_B).astype(np.float64)
        return whole
    nll_N, counts_N = reference_nll(dataset), dataset.weight_N > 0
    sum_P, count_P = (_over_targets(values_N, pieces) for values_N in (nll_N, counts_N.astype(np.float64)))
    mean: Float64Array = np.add.reduceat(sum_P, first_B) / np.add.reduceat(count_P, first_B)
    return mean


def reference_nll(dataset: TokenDataset) -> Float64Array:
    """NLL of each counted token under the reference, 0 elsewhere, [N].

    Raises:
        BadInput: there is no such column, or it lacks a number at a counted token.
    """
    fix = "score the data with the reference first: a stage of kind reference"
    if REFERENCE not in dataset.columns:
        raise BadInput(f"the data has no column {REFERENCE}", fix=fix)
    counted_N = dataset.weight_N > 0
    nll_N = np.where(counted_N, -dataset.columns[REFERENCE].astype(np.float64), 0.0)
    missing_N = ~np.isfinite(nll_N)
    if missing_N.any():
        document = int(np.searchsorted(dataset.offset_D, np.argmax(missing_N), "right")) - 1
        raise BadInput(
            f"{int(missing_N.sum())} counted tokens have no finite {REFERENCE}",
            where=f"the first is of document {dataset.document_ids[document]}",
            fix=fix,
        )
    return nll_N


def rising(own: Int64Array, hard_B: Float64Array, parts: int, random: np.random.Generator) -> Int64Array:
    """The bundles `own` in parts of rising difficulty, shuffled within each.

    >>> rising(np.arange(4), np.array([3.0, 1.0, 2.0, 0.0]), 4, np.random.default_rng(0)).tolist()
    [3, 1, 2, 0]
    """
    ranked = own[np.argsort(hard_B[own], kind="stable")]
    return np.concatenate([random.permutation(part) for part in np.array_split(ranked, parts)])


def wanted_tokens(start_S: Float64Array, end_S: Float64Array, ramp_tokens: int, drawn: int) -> Float64Array:
    """How many of the first `drawn` input tokens each slice should have had: the integral of its share.

    >>> wanted_tokens(np.array([1.0, 0.0]), np.array([0.0, 1.0]), 100, 100).tolist()
    [50.0, 50.0]
    """
    inside = min(drawn, ramp_tokens)
    moved = inside**2 / (2 * ramp_tokens)
    return start_S * (inside - moved) + end_S * (moved + drawn - inside)


def _over_targets(values_N: Float64Array, pieces: Pieces) -> Float64Array:
    """Sums over the targets of each piece, [P]."""
    before_N = np.concatenate([np.zeros(1), np.cumsum(values_N)])
    first_P = pieces.start_P + 1
    sums: Float64Array = before_N[first_P + pieces.length_P] - before_N[first_P]
    return sums
