"""Parts: one shard's share of the work, done by whoever is free.

    Part --annotate_part--> <target>/annotations.parquet, failed.parquet
    Part --sign_part------> <target>/signatures.parquet

A part's folder appears whole, when all in it is on the disk; that it is there says that the part is done.

A step that fails on a batch is given its documents one by one, so that the one it fails on is known by name;
the others have their annotations. What becomes of such a document is for the build to say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from gyrocompass.core.errors import GyroError
from gyrocompass.core.folder import land, staging, sync
from gyrocompass.data.curate.corpus import Corpus
from gyrocompass.data.curate.decide import FAILURE_SCHEMA, FAILURES
from gyrocompass.data.curate.step import BATCH_SCHEMA, GlobalStep, RecordStep, Step, join_batches

ANNOTATIONS = "annotations.parquet"
SIGNATURES = "signatures.parquet"

_REASON_LENGTH = 300
"""Characters of an error that a failed document keeps."""


class Part(NamedTuple):
    """One shard for one step."""

    step: Step
    corpus: Path
    annotations: dict[str, Path]
    """Folders of the steps that it reads, by label."""
    shard: int
    target: Path
    batch_rows: int


def annotate_part(part: Part) -> None:
    """Annotate a shard."""
    assert isinstance(part.step, RecordStep)
    table, failures = _mapped(part, part.step.annotate)
    _land(part, ANNOTATIONS, table, failures)


def sign_part(part: Part) -> None:
    """Compute the signatures of a shard."""
    assert isinstance(part.step, GlobalStep)
    table, failures = _mapped(part, part.step.signatures)
    _land(part, SIGNATURES, table, failures)


def read_signatures(folders: list[Path]) -> Iterator[pa.RecordBatch]:
    """The signatures of all shards, in order, one shard in memory at a time."""
    for folder in folders:
        yield from pq.read_table(folder / SIGNATURES).to_batches()


def _mapped(
    part: Part, function: Callable[[pa.RecordBatch], pa.RecordBatch]
) -> tuple[pa.Table, list[dict[str, str]]]:
    corpus = Corpus(part.corpus, part.annotations, part.batch_rows)
    failures: list[dict[str, str]] = []
    columns = [*BATCH_SCHEMA.names, *part.step.reads()]
    made = [
        _one_batch(part.step, function, batch, failures)
        for batch in corpus.shard_batches(part.shard, columns)
    ]
    return pa.Table.from_batches(made).combine_chunks(), failures


def _one_batch(
    step: Step,
    function: Callable[[pa.RecordBatch], pa.RecordBatch],
    batch: pa.RecordBatch,
    failures: list[dict[str, str]],
) -> pa.RecordBatch:
    try:
        made = function(batch)
    except GyroError:
        raise
    except Exception as error:  # whatever a step trips over, the document it was about has to be named
        if batch.num_rows > 1:
            rows = [
                _one_batch(step, function, batch.slice(row, 1), failures) for row in range(batch.num_rows)
            ]
            return join_batches(rows, rows[0].schema)
        reason = f"{type(error).__name__}: {error}"[:_REASON_LENGTH]
        failures.append({"id": batch["id"][0].as_py(), "path": batch["path"][0].as_py(), "reason": reason})
        return _nulls(function(batch.slice(0, 0)).schema, batch["id"])
    assert made.schema.names[0] == "id" and made.column(0).equals(batch["id"]), (
        f"{step.name}: a row for each document, in their order, the column id first"
    )
    return made


def _nulls(schema: pa.Schema, ids: pa.Array) -> pa.RecordBatch:
    columns = [pa.nulls(len(ids), kind) for kind in schema.types[1:]]
    return pa.RecordBatch.from_arrays([ids, *columns], schema=schema)


def _land(part: Part, name: str, table: pa.Table, failures: list[dict[str, str]]) -> None:
    with staging(part.target.parent) as folder:
        pq.write_table(table, folder / name, compression="zstd")
        pq.write_table(pa.Table.from_pylist(failures, FAILURE_SCHEMA), folder / FAILURES)
        sync(folder)
        land(folder, part.target, replace=False)
