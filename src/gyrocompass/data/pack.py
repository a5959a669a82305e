"""Packing: documents cut into pieces, pieces packed into rows, rows assembled into a flat batch.

    TokenDataset --cut--> Pieces --bundle, pack--> rows --assemble--> Packed

A document of n tokens holds n - 1 predictions: token i reads, token i + 1 is its target. The shift is made
before the cut, so a cut loses no target: every counted target of the dataset is in exactly one piece. A piece
is a segment of its own: positions restart and attention stays inside, so what follows a cut does not see what
was before it. Pieces that predict nothing (a long prompt's first part) are left out. What belongs to a named
unit (the sides of a pair, a whole answer with one reward) is never cut, and a unit's pieces share a row: a
micro-batch is made of rows, so an objective about a pair sees both sides however the rows are split.

Rows are filled best-fit-decreasing: the longest piece first, into the row it leaves fullest. Over free space
counted in tokens that is exact with one stack of rows per free space and a bit mask of the stacks in use: a
million pieces take about two seconds (Ding et al. 2024, "Fewer truncations improve language modeling").

Shape legend: N tokens of the dataset, D documents, P pieces, T = rows * length positions of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from gyrocompass.core.errors import BadInput
from gyrocompass.data.tokens import IntArray, TokenDataset

IGNORE_INDEX = -100
"""The target of a position that predicts nothing; the same as in `gyrocompass.loss.signal`."""

Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]


class Packed(NamedTuple):
    """A packed batch in numpy: the fields of `gyrocompass.loss.signal.Batch`.

    A position counts if and only if its weight is above 0; else its target is `IGNORE_INDEX`. Padding is at
    the end of each row; its token is 0, its positions restart at 0 as those of a segment of its own do.
    """

    token_T: Int64Array
    target_T: Int64Array
    position_T: Int64Array
    segment_T: Int64Array
    """Numbered from 0 over the batch; -1 for padding."""
    document_T: Int64Array
    slice_T: Int64Array
    source_T: Int64Array
    weight_T: Float32Array
    byte_T: Int64Array
    unit_T: Int64Array
    """Index of the unit in the dataset; -1 for padding."""
    length: int
    columns: Mapping[str, Float32Array] = MappingProxyType({})
    """Each column and label of the dataset, [T]; NaN where there is none, and at padding."""

    @property
    def rows(self) -> int:
        """Rows of `length` positions."""
        return len(self.token_T) // self.length

    def take(self, start: int, stop: int) -> Packed:
        """Rows start to stop as a batch of their own, as if only those had been assembled."""
        part = self.at(slice(start * self.length, stop * self.length), self.length)
        segment_T = part.segment_T
        if (segment_T >= 0).any():
            segment_T = np.where(segment_T < 0, -1, segment_T - segment_T[segment_T >= 0].min())
        return part._replace(segment_T=segment_T)

    def at(self, positions: slice | IntArray, length: int) -> Packed:
        """The given positions as rows of `length`; segments keep their numbers."""
        own = self._asdict() | {"length": length}
        own |= {name: column[positions] for name, column in own.items() if isinstance(column, np.ndarray)}
        own["columns"] = {name: column[positions] for name, column in self.columns.items()}
        return Packed(**own)

    def split(self, rows: int) -> Iterator[Packed]:
        """Micro-batches of at most `rows` rows, in order."""
        for start in range(0, self.rows, rows):
            yield self.take(start, start + rows)


class Pieces(NamedTuple):
    """Runs of at most `length` inputs of one document; its targets are the same run, one token later."""

    document_P: Int64Array
    start_P: Int64Array
    """Index into the dataset's flat arrays of the piece's first input."""
    length_P: Int64Array

    @property
    def n_pieces(self) -> int:
        """How many."""
        return len(self.document_P)


def cut(dataset: TokenDataset, length: int) -> Pieces:
    """Cut every document into pieces of at most `length` inputs, leaving out those that predict nothing.

    A document is cut from its start: all its pieces but the last are `length` long.

    Raises:
        BadInput: a document that must stay whole is longer.
    """
    input_D = np.diff(dataset.offset_D) - 1
    too_long = np.flatnonzero(dataset.whole_D & (input_D > length))
    if len(too_long):
        longest = too_long[np.argmax(input_D[too_long])]
        raise BadInput(
            f"{len(too_long)} documents that must stay whole are longer than rows of {length} tokens; "
            f"the longest, {dataset.document_ids[longest]}, has {input_D[longest]}",
            fix="raise sequence_length, or set max_tokens where they are tokenised",
        )
    pieces_D = -(-input_D // length)
    document_P = np.repeat(np.arange(dataset.n_documents, dtype=np.int64), pieces_D)
    nth_P = _ranges(pieces_D)
    start_P = dataset.offset_D[document_P] + nth_P * length
    length_P = np.minimum(input_D[document_P] - nth_P * length, length)
    counted_N = np.concatenate([np.zeros(1, np.int64), np.cumsum(dataset.weight_N > 0)])
    kept_P = counted_N[start_P + length_P + 1] > counted_N[start_P + 1]
    return Pieces(document_P[kept_P], start_P[kept_P], length_P[kept_P])


def bundle(dataset: TokenDataset, pieces: Pieces, length: int) -> Int64Array:
    """Which pieces share a row: bundle b is the pieces from the b-th number to the next; B + 1 numbers.

    Raises:
        BadInput: a unit is longer than a row.
    """
    unit_P = dataset.unit_D[pieces.document_P]
    joined_P = (unit_P == np.roll(unit_P, 1)) & dataset.whole_D[pieces.document_P]
    first_P = np.flatnonzero(~joined_P) if len(unit_P) > 1 else np.arange(len(unit_P))
    if len(unit_P) and not len(first_P):
        first_P = np.zeros(1, np.int64)  # all pieces are of one unit
    bounds = np.append(first_P, len(unit_P)).astype(np.int64)
    size_B = np.add.reduceat(pieces.length_P, bounds[:-1]) if len(unit_P) else np.zeros(0, np.int64)
    if size_B.max(initial=0) > length:
        worst = int(np.argmax(size_B))
        name = dataset.document_ids[pieces.document_P[bounds[worst]]]
        raise BadInput(
            f"{int((size_B > length).sum())} units (pairs, for example) are longer than rows of {length} "
            f"tokens; the longest begins with {name} and has {size_B[worst]}",
            fix="raise sequence_length, or set max_tokens where they are tokenised",
        )
    return bounds


def pack(length_P: IntArray, length: int) -> list[list[int]]:
    """Best-fit-decreasing: indices of pieces for each row of `length` positions.

    Deterministic; every piece is in exactly one row.

    >>> pack(np.array([3, 7, 5, 2]), 10)
    [[1, 0], [2, 3]]
    """
    assert np.all(length_P > 0) and np.all(length_P <= length), "a piece does not fit into a row"
    rows: list[list[int]] = []
    rows_by_free: list[list[int]] = [[] for _ in range(length)]
    free_mask = 0  # bit f is set if a row with f free positions exists
    sizes: list[int] = length_P.tolist()
    for piece in np.argsort(-length_P, kind="stable").tolist():
        size = sizes[piece]
        fitting = free_mask >> size
        if fitting:
            free = size + (fitting & -fitting).bit_length() - 1
            row = rows_by_free[free].pop()
            if not rows_by_free[free]:
                free_mask ^= 1 << free
            rows[row].append(piece)
        else:
            free, row = length, len(rows)
            rows.append([piece])
        left = free - size
        if left:
            rows_by_free[left].append(row)
            free_mask |= 1 << left
    return rows


def assemble(dataset: TokenDataset, pieces: Pieces, rows: Sequence[Sequence[int]], length: int) -> Packed:
    """Lay pieces out as rows of a batch.

    Args:
        dataset: what the pieces were cut from.
        pieces: as `cut` gives them.
        rows: for each row, indices of its pieces, in order.
        length: positions in a row.
    """
    T = len(rows) * length
    piece_S = np.array([piece for row in rows for piece in row], np.int64)  # S: segments of the batch
    length_S = pieces.length_P[piece_S]
    row_S = np.repeat(np.arange(len(rows), dtype=np.int64), [len(row) for row in rows])
    before_S = np.cumsum(length_S) - length_S  # positions used before each segment, over all rows
    used = np.bincount(row_S, length_S, len(rows)).astype(np.int64)
    assert np.all(used <= length), "a row is overfull"
    first_S = before_S + row_S * length - (np.cumsum(used) - used)[row_S]

    offset = _ranges(length_S)
    place = np.repeat(first_S, length_S) + offset
    token_index = np.repeat(pieces.start_P[piece_S], length_S) + offset

    def column(values: IntArray, padding: int) -> Int64Array:
        laid_T = np.full(T, padding, np.int64)
        laid_T[place] = values
        return laid_T

    weight_T = np.zeros(T, np.float32)
    weight_T[place] = dataset.weight_N[token_index + 1]
    document_T = column(np.repeat(pieces.document_P[piece_S], length_S), -1)
    position_T = np.tile(np.arange(length, dtype=np.int64), len(rows)) - np.repeat(used, length)
    position_T[place] = offset
    target_T = column(dataset.id_N[token_index + 1], IGNORE_INDEX)
    of_document = document_T[place]

    def numbers(values: npt.NDArray[np.float32]) -> Float32Array:
        laid_T = np.full(T, np.nan, np.float32)
        laid_T[place] = values
        return laid_T

    return Packed(
        token_T=column(dataset.id_N[token_index], 0),
        target_T=np.where(weight_T > 0, target_T, IGNORE_INDEX),
        position_T=position_T,
        segment_T=column(np.repeat(np.arange(len(piece_S)), length_S), -1),
        document_T=document_T,
        slice_T=column(dataset.slice_D[of_document], -1),
        source_T=column(dataset.source_D[of_document], -1),
        weight_T=weight_T,
        byte_T=column(dataset.byte_N[token_index + 1], 0),
        unit_T=column(dataset.unit_D[of_document], -1),
        length=length,
        columns={name: numbers(values_N[token_index + 1]) for name, values_N in dataset.columns.items()}
        | {name: numbers(values_D[of_document]) for name, values_D in dataset.labels.items()},
    )


def _ranges(length_K: IntArray) -> Int64Array:
    """0, 1, ..., length - 1 for each length, one after the other."""
    ends = np.cumsum(length_K)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total, dtype=np.int64) - np.repeat(ends - length_K, length_K)
