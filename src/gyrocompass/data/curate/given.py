"""Texts from anywhere as the batches that steps see, for the plain functions beside them.

texts, ids --batches_of--> RecordBatch(id, text), ...
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import pyarrow as pa

from gyrocompass.core.errors import BadInput
from gyrocompass.data.curate.columns import string_column

BATCH_DOCUMENTS = 1024


def batches_of(texts: Iterable[str], ids: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
    """Batches with the columns `id` and `text`; at least one, which may be empty.

    Args:
        texts: read once, and not kept.
        ids: one for each text; None: their places, "00000000", "00000001", ...

    Raises:
        BadInput: ids are not all different or not as many as texts, or a text is not one.
    """
    if ids is not None and len(set(ids)) < len(ids):
        twice = next(one for one, count in Counter(ids).items() if count > 1)
        raise BadInput(f"two texts have the id {twice}", fix="give each text an id of its own")
    given, start = iter(texts), 0
    while True:
        batch = string_column(list(islice(given, BATCH_DOCUMENTS)))
        stop = start + len(batch)
        if ids is not None and (stop > len(ids) or (len(batch) < BATCH_DOCUMENTS and stop < len(ids))):
            count = f"more than {len(ids)}" if stop > len(ids) else str(stop)
            raise BadInput(f"{count} texts, but {len(ids)} ids", fix="give one id for each text")
        names = [f"{place:08d}" for place in range(start, stop)] if ids is None else list(ids[start:stop])
        if len(batch) or not start:
            yield pa.RecordBatch.from_arrays([string_column(names).cast(pa.string()), batch], ["id", "text"])
        if len(batch) < BATCH_DOCUMENTS:
            return
        start = stop
