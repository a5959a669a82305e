"""Packing: documents cut into pieces, pieces packed into rows, rows assembled into a flat batch.

    TokenDataset --cut--> Pieces --pack--> rows --assemble--> Packed

A document of n tokens holds n - 1 predictions: token i reads, token i + 1 is its target. The shift is made
before the cut, so a cut loses no target: every counted target of the dataset is in exactly one piece. A piece
is a segment of its own: positions restart and attention stays inside, so what follows a cut does not see what
was before it. Pieces that predict nothing (a long prompt's first part) are left out.

Rows are filled best-fit-decreasing: the longest piece first, into the row it leaves fullest. Over free space
counted in tokens that is exact with one stack of rows per free space and a bit mask of the stacks in use: a
million pieces take about two seconds (Ding et al. 2024, "Fewer truncations improve language modeling").

Shape legend: N tokens of the dataset, D documents, P pieces, T = rows * length positions of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from gyrocompass.data.tokens import IntArray, TokenDataset

IGNORE_INDEX = -100
"""The target of a position that predicts nothing; the same as in `gyrocompass.loss.signal`."""

Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]


class Packed(NamedTuple):
    """A packed batch in numpy: the fields of `gyrocompass.loss.signal.Batch`, without its columns.

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
    length: int

    @property
    def rows(self) -> int:
        """Rows of `length` positions."""
        return len(self.token_T) // self.length

    def take(self, start: int, stop: int) -> Packed:
        """Rows start to stop as a batch of their own, as if only those had been assembled."""
        columns = [column[start * self.length : stop * self.length] for column in self[:-1]]
        part = Packed._make([*columns, self.length])
        segment_T = part.segment_T
        if (segment_T >= 0).any():
            segment_T = np.where(segment_T < 0, -1, segment_T - segment_T[segment_T >= 0].min())
        return part._replace(segment_T=segment_T)

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
    """
    input_D = np.diff(dataset.offset_D) - 1
    pieces_D = -(-input_D // length)
    document_P = np.repeat(np.arange(dataset.n_documents, dtype=np.int64), pieces_D)
    nth_P = _ranges(pieces_D)
    start_P = dataset.offset_D[document_P] + nth_P * length
    length_P = np.minimum(input_D[document_P] - nth_P * length, length)
    counted_N = np.concatenate([np.zeros(1, np.int64), np.cumsum(dataset.weight_N > 0)])
    kept_P = counted_N[start_P + length_P + 1] > counted_N[start_P + 1]
    return Pieces(document_P[kept_P], start_P[kept_P], length_P[kept_P])


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
        length=length,
    )


def _ranges(length_K: IntArray) -> Int64Array:
    """0, 1, ..., length - 1 for each length, one after the other."""
    ends = np.cumsum(length_K)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total, dtype=np.int64) - np.repeat(ends - length_K, length_K)
