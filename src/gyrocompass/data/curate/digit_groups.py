"""Runs of digits in a joined text, and the groups they form: where numbers that name somebody can stand.

    code_N --find--> runs "212" "555" "0123"  --> group "212-555-0123"

Most characters of a text are not part of a number, so that patterns are tried at the groups alone. Two runs
belong to one group where at most three characters stand between them and all of those are separators.

Shape legend: N characters, R runs, G groups.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gyrocompass.data.curate.joined import Flags, Int64Array, is_any, runs

SEPARATORS = " \xa0.-/()"


class DigitGroups(NamedTuple):
    """The runs of digits of a text and their groups."""

    start_R: Int64Array
    end_R: Int64Array
    first_G: Int64Array
    """The first run of each group."""
    start_G: Int64Array
    end_G: Int64Array
    n_digits_G: Int64Array

    def group(self, number: int) -> tuple[int, int]:
        """Where a group starts and ends."""
        return int(self.start_G[number]), int(self.end_G[number])


def find(code_N: NDArray[np.uint8]) -> DigitGroups:
    """The digit groups of a text.

    >>> groups = find(np.frombuffer(b"call (212) 555-0123, 7 times", np.uint8))
    >>> groups.start_G.tolist(), groups.end_G.tolist(), groups.n_digits_G.tolist()
    ([6, 21], [19, 22], [10, 1])
    """
    start_R, end_R = runs(code_N - 48 < 10)
    is_joined_R = np.zeros(len(start_R), dtype=np.bool_)
    if len(start_R):
        is_joined_R[1:] = _joined(code_N, end_R[:-1], start_R[1:] - end_R[:-1])
    first_G = np.flatnonzero(~is_joined_R)
    last_G = np.append(first_G[1:], len(start_R)) - 1 if len(first_G) else first_G
    n_digits_G = np.add.reduceat(end_R - start_R, first_G) if len(first_G) else first_G
    return DigitGroups(start_R, end_R, first_G, start_R[first_G], end_R[last_G], n_digits_G)


def _joined(code_N: NDArray[np.uint8], gap_start: Int64Array, gap: Int64Array) -> Flags:
    """Whether a gap is short and holds separators alone."""
    joined = gap <= 3
    for place in range(3):
        reaches = np.flatnonzero(joined & (gap > place))
        joined[reaches] = is_any(code_N[gap_start[reaches] + place], SEPARATORS)
    return joined
