"""What the tests of annotating steps share: batches of documents, and the laws every such step keeps."""

import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from gyrocompass.data.curate.step import BATCH_SCHEMA, RecordStep


def library_texts(n: int) -> list[str]:
    """About n files of this interpreter's standard library, tests left out, evenly over their names."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3"}
    paths = sorted(
        path for path in folder.rglob("*.py") if left_out.isdisjoint(path.relative_to(folder).parts)
    )
    chosen = paths[:: max(len(paths) // n, 1)][:n]
    return [path.read_bytes().decode("utf-8", "replace") for path in chosen]


def batch(texts: Sequence[str], **columns: Sequence[Any]) -> pa.RecordBatch:
    """Documents with these texts; other columns as given, or as of a file of prose."""
    n = len(texts)
    made: dict[str, Sequence[Any]] = {
        "id": [f"{number:016x}" for number in range(n)],
        "content_hash": [f"{number:064x}" for number in range(n)],
        "text": texts,
        "path": [f"notes/{number}.txt" for number in range(n)],
        "source": ["files"] * n,
        "slice": ["prose"] * n,
        "licence": [None] * n,
        "language": [None] * n,
        "n_bytes": [len(text.encode("utf-8", "surrogatepass")) for text in texts],
        "time": [None] * n,
    }
    return pa.RecordBatch.from_pydict({**made, **columns}, BATCH_SCHEMA)


def check_step(step: RecordStep, documents: pa.RecordBatch) -> pa.RecordBatch:
    """Annotate, and check that a document's row depends on that document alone.

    Together, one by one and in reverse the rows are the same, and no documents give no rows of the same
    types.
    """
    rows = step.annotate(documents)
    assert rows.schema.names[0] == "id" and rows["id"].to_pylist() == documents["id"].to_pylist()
    alone = [step.annotate(documents.slice(row, 1)) for row in range(documents.num_rows)]
    assert all(one.schema == rows.schema for one in alone)
    assert [one.to_pylist()[0] for one in alone] == rows.to_pylist()
    backwards = documents.take(pa.array(range(documents.num_rows - 1, -1, -1), pa.int64()))
    assert step.annotate(backwards).to_pylist()[::-1] == rows.to_pylist()
    assert step.annotate(documents.slice(0, 0)).schema == rows.schema
    return rows
