"""Rolling windows: documents longer than a model looks back, each token scored once with enough before it.

    a document of n tokens, windows of L inputs, stride S:  window k reads tokens [kS, kS + L)
    the first window predicts all that it reads the predecessors of; each later one its last S

So every token has at least L - S tokens before it, or the whole of what the document has, and is predicted by
exactly one window. S = L is the cut of training (`pack.cut`); S = 1 gives every token all of L, at L times
the cost. The work is about L / S that of S = L.

Windows are documents of their own with the same id, slice, source and group, so sums by any of these are
those of the documents.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gyrocompass.core.errors import BadInput
from gyrocompass.data.tokens import TokenDataset, TokenRow


def windowed(dataset: TokenDataset, length: int, stride: int) -> TokenDataset:
    """The dataset with its long documents as windows.

    Args:
        dataset: any.
        length: inputs of a window.
        stride: from the beginning of one window to that of the next.

    Raises:
        BadInput: the stride is not from 1 to `length`, or documents that must stay whole are longer.
    """
    if not 1 <= stride <= length:
        raise BadInput(f"a stride of {stride} is not from 1 to the {length} tokens of a window")
    return TokenDataset.of(window for row in dataset.rows() for window in _windows(row, length, stride))


def _windows(row: TokenRow, length: int, stride: int) -> Iterator[TokenRow]:
    inputs = len(row.ids) - 1
    if inputs <= length or row.unit:
        yield row
        return
    weights = np.asarray(row.weights, np.float32)
    done = 1  # the first token is predicted by nothing
    for start in range(0, inputs - length + stride, stride):
        end = min(start + length + 1, len(row.ids))
        own = slice(start, end)
        counted = weights[own].copy()
        counted[: done - start] = 0
        done = end
        yield row._replace(
            ids=row.ids[own],
            byte_counts=np.where(counted > 0, np.asarray(row.byte_counts)[own], 0),
            weights=counted,
            columns={name: np.asarray(values)[own] for name, values in row.columns.items()},
        )
        if end == len(row.ids):
            return
