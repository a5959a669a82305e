"""Batches in blocks that a processor's cache holds: the same rows, about twice as fast.

    documents --by_blocks(annotate)--> annotations of all of them

Steps that go over a batch's characters with arrays make several for each character; of a few megabytes of
text they no longer fit where they can be read quickly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa

BLOCK_BYTES = 2**18


def by_blocks(
    documents: pa.RecordBatch, annotate: Callable[[pa.RecordBatch], pa.RecordBatch]
) -> pa.RecordBatch:
    """What `annotate` says of the documents, block by block; it looks at each document by itself."""
    parts = [annotate(block) for block in _blocks(documents)]
    if len(parts) == 1:
        return parts[0]
    return pa.Table.from_batches(parts).combine_chunks().to_batches()[0]


def _blocks(documents: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """Slices of about `BLOCK_BYTES`, at least one document each; of no documents one that is empty."""
    sizes = documents.column("n_bytes").to_numpy(zero_copy_only=False)
    begins = np.concatenate([[0], np.cumsum(sizes)])
    start = 0
    while True:
        stop = int(np.searchsorted(begins, begins[start] + BLOCK_BYTES, side="right")) - 1
        stop = min(max(stop, start + 1), documents.num_rows)
        yield documents.slice(start, stop - start)
        start = stop
        if start >= documents.num_rows:
            return
