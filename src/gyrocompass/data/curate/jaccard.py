"""Exact similarity of sets of shingles, many pairs at a time.

    pairs, Gather --compare--> Overlap      |A|, |B| and |A & B| for every pair

A pair is one row of a matrix: the numbers of A with their lowest bit cleared, those of B with it set, and
filling. When rows are sorted, equal numbers are neighbours; a number changes from A to B once if both have
it. So that counting neighbours gives the sizes of A, B and of what they share, repeated shingles counted
once, with one sort for a thousand pairs. Sets are compared by 63 of their 64 bits.

Shape legend: P pairs, L the longest row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from gyrocompass.data.curate.words import Int64Array, UInt64Array

Gather = Callable[[Int64Array], tuple[UInt64Array, Int64Array]]
"""From documents [D], ascending, to their shingles one after another [S] and where each begins [D + 1]."""

BATCH_CELLS = 2**19
"""Cells of a matrix that is compared at once: 4 MiB."""


class Overlap(NamedTuple):
    """What the two sets of each pair have in common."""

    left_P: Int64Array
    """Elements of the first set."""
    right_P: Int64Array
    shared_P: Int64Array

    @property
    def jaccard_P(self) -> npt.NDArray[np.float64]:
        """Shared over all; 0 for two empty sets."""
        all_P = np.maximum(self.left_P + self.right_P - self.shared_P, 1)
        return np.asarray(self.shared_P / all_P, np.float64)


def compare(left_P: Int64Array, right_P: Int64Array, size_D: Int64Array, gather: Gather) -> Overlap:
    """Compare documents pair by pair.

    Args:
        left_P: documents.
        right_P: the other one of each pair.
        size_D: about how many shingles each document has: pairs of like length share a matrix.
        gather: gives the shingles of documents.

    Returns:
        Sizes in the order of the pairs.
    """
    found = Overlap(*(np.zeros(len(left_P), np.int64) for _ in range(3)))
    width_P = size_D[left_P] + size_D[right_P]
    for chosen in _batches(width_P):
        part = _compare(left_P[chosen], right_P[chosen], gather)
        for whole, values in zip(found, part, strict=True):
            whole[chosen] = values
    return found


def _batches(width_P: Int64Array) -> Iterator[Int64Array]:
    """Pairs of like width, as many as fit the cells."""
    order_P = np.argsort(width_P, kind="stable")
    start = 0
    while start < len(order_P):
        # Rows are as wide as the last of them: take rows while (their number) * (width of the last) fits.
        ahead = width_P[order_P[start : start + BATCH_CELLS]]
        cells = np.arange(1, len(ahead) + 1) * ahead
        count = max(1, int(np.searchsorted(cells, BATCH_CELLS, side="right")))
        yield order_P[start : start + count]
        start += count


def _compare(left_P: Int64Array, right_P: Int64Array, gather: Gather) -> Overlap:
    """One matrix."""
    documents, place = np.unique(np.concatenate([left_P, right_P]), return_inverse=True)
    pool_S, begin_D1 = gather(documents)
    sides_PP = place.reshape(2, -1).T.reshape(-1)  # left, right, left, right, ...
    length_PP = np.diff(begin_D1)[sides_PP]
    end_PP = np.cumsum(length_PP)
    flat = np.arange(end_PP[-1] if len(end_PP) else 0)
    flat += np.repeat(begin_D1[sides_PP] - (end_PP - length_PP), length_PP)
    value = pool_S[flat] & ~np.uint64(1)
    value |= np.repeat(np.tile(np.array([0, 1], np.uint64), len(left_P)), length_PP)
    width_P = length_PP.reshape(-1, 2).sum(axis=1)
    widest = int(width_P.max(initial=0))
    row_PL = np.zeros((len(left_P), widest + 1), np.uint64)
    inside_PL = np.arange(widest + 1) < width_P[:, None]
    row_PL[inside_PL] = value
    # Filling repeats the row's first number, which its set has already: it adds to no count.
    row_PL[~inside_PL] = np.repeat(row_PL[:, 0], widest + 1 - width_P)
    row_PL.sort(axis=1)
    fresh_PL = row_PL[:, 1:] != row_PL[:, :-1]
    of_right_PL = (row_PL & np.uint64(1)).astype(np.bool_)
    crossed_PL = (
        row_PL[:, 1:] ^ row_PL[:, :-1]
    ) == 1  # from A to B: within a pair of neighbours only A is even
    shared_P = (crossed_PL & of_right_PL[:, 1:]).sum(axis=1)
    right_P_ = (fresh_PL & of_right_PL[:, 1:]).sum(axis=1) + of_right_PL[:, 0]
    distinct_P = fresh_PL.sum(axis=1) + 1
    sizes = length_PP.reshape(-1, 2)
    left_size = np.where(sizes[:, 0] > 0, distinct_P - right_P_, 0)
    return Overlap(left_size, np.where(sizes[:, 1] > 0, right_P_, 0), shared_P)
