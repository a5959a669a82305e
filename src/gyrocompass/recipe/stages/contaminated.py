"""How much of a task's items a model may have read: runs of words of them in what it learned from.

    model --lineage--> data sets it learned from --decontamination--> items that stand in them

An item counts as read where a run of `NGRAM` words of its question stands in a training text, or the whole
question where it is shorter (`data.curate.decontaminate` says how; questions below 5 words are not looked
for). Beside the share stand the accuracies of items that were read and of those that were not: a model that
is better at the former owes some of its score to memory.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from gyrocompass.core.artifact import Artifact
from gyrocompass.core.store import Store
from gyrocompass.data.curate.benchmark_items import Benchmark
from gyrocompass.data.curate.decontaminate import Decontamination
from gyrocompass.data.curate.spans import from_arrow
from gyrocompass.data.document import read_documents
from gyrocompass.measure.calibration_metrics import wilson
from gyrocompass.measure.tasks.run import TaskResult
from gyrocompass.measure.tasks.task import Item
from gyrocompass.recipe.stages.learned import learned_from

NGRAM = 13
_BATCH = 256


def contamination(
    store: Store, model: Artifact, asked: Sequence[tuple[TaskResult, Sequence[Item]]]
) -> list[dict[str, Any]]:
    """One row for each task; nothing where lineage knows no data set.

    Args:
        store: where the model is.
        model: the artifact.
        asked: results, and the items behind them.
    """
    folders = [
        one.path for one in learned_from(store, model) if one.manifest.kind in ("documents", "dataset")
    ]
    if not folders or not asked:
        return []
    with tempfile.TemporaryDirectory() as scratch:
        step = Decontamination(
            benchmarks=tuple(
                _benchmark(Path(scratch), place, items) for place, (_, items) in enumerate(asked)
            ),
            ngram=NGRAM,
            jaccard=None,
        )
        hits: set[tuple[int, int]] = set()
        read = 0
        for batch in _batches(folders):
            read += batch.num_rows
            for spans in from_arrow(step.annotate(batch)["spans"]):
                for span in spans:
                    name, _, number = span.kind.partition(":")[2].rpartition("#")
                    hits.add((int(name), int(number)))
    return [
        _row(result, items, {number for place, number in hits if place == own}, read)
        for own, (result, items) in enumerate(asked)
    ]


def _benchmark(folder: Path, place: int, items: Sequence[Item]) -> Benchmark:
    path = folder / f"{place}.jsonl"
    lines = [json.dumps({"question": item.prompt}) for item in items]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Benchmark(path=path, name=str(place))


def _batches(folders: Sequence[Path]) -> Iterator[pa.RecordBatch]:
    """The texts of documents, as a step reads them."""
    ids: list[str] = []
    texts: list[str] = []
    for folder in folders:
        for document in read_documents(folder):
            ids.append(document.id)
            texts.append("\n".join(document.texts))
            if len(ids) == _BATCH:
                yield _batch(ids, texts)
                ids, texts = [], []
    if ids:
        yield _batch(ids, texts)


def _batch(ids: list[str], texts: list[str]) -> pa.RecordBatch:
    sizes = pa.array([len(text.encode()) for text in texts], pa.int64())
    columns = [pa.array(ids, pa.string()), pa.array(texts, pa.large_string()), sizes]
    return pa.RecordBatch.from_arrays(columns, ["id", "text", "n_bytes"])


def _row(result: TaskResult, items: Sequence[Item], read: set[int], documents: int) -> dict[str, Any]:
    names = {items[number].id for number in read}
    low, high = wilson(len(names), len(items))
    signals = [outcome.signal for outcome in result.outcomes]
    own = [one for one in result.outcomes if one.signal == signals[0]]
    row: dict[str, Any] = {
        "task": result.task.name,
        "items": len(items),
        "read": len(names),
        "share": len(names) / len(items),
        "low": low,
        "high": high,
        "documents": documents,
    }
    for label, part in (
        ("accuracy_read", [one for one in own if one.item in names]),
        ("accuracy_rest", [one for one in own if one.item not in names]),
    ):
        right = [one.correct for one in part]
        bounds = wilson(sum(right), len(right)) if right else (None, None)
        row[label] = {
            "value": float(np.mean(right)) if right else None,
            "low": bounds[0],
            "high": bounds[1],
            "items": len(right),
        }
    return row
