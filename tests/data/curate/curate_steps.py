"""Steps that the tests of the pipeline run: what they say is easy to foresee."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa

from gyrocompass.core.progress import Progress
from gyrocompass.core.store import Store
from gyrocompass.data.curate.build import Builder, Built
from gyrocompass.data.curate.config import BuildConfig, build_from
from gyrocompass.data.curate.executor import Executor, LocalExecutor
from gyrocompass.data.curate.step import SPANS, CorpusAccess, GlobalStep, RecordStep, register


@register
class CountWords(RecordStep):
    """How many words there are, and where the longest is."""

    name: ClassVar[str] = "count_words"
    wait_s: float = 0.0
    counting_file: str | None = None
    """Gets a byte for each document looked at."""

    def annotate(self, documents: pa.RecordBatch) -> pa.RecordBatch:
        words, longest = [], []
        for text in documents["text"].to_pylist():
            time.sleep(self.wait_s)
            if text.startswith("poison"):
                raise ZeroDivisionError("poisoned")
            parts = text.split()
            words.append(len(parts))
            best = max(parts, key=len)
            at = text.index(best)
            longest.append([{"start": at, "end": at + len(best), "kind": "longest", "score": 0.75}])
        if self.counting_file:
            with Path(self.counting_file).open("ab") as file:
                file.write(b"." * documents.num_rows)
        columns = [documents["id"], pa.array(words, pa.int64()), pa.array(longest, SPANS)]
        return pa.RecordBatch.from_arrays(columns, ["id", "words", "longest"])


@register
class SameStart(GlobalStep):
    """Documents that begin with the same word are a cluster."""

    name: ClassVar[str] = "same_start"

    def signatures(self, documents: pa.RecordBatch) -> pa.RecordBatch:
        starts = [text.split()[0] for text in documents["text"].to_pylist()]
        return pa.RecordBatch.from_arrays([documents["id"], pa.array(starts, pa.string())], ["id", "start"])

    def resolve(self, signatures: Iterator[pa.RecordBatch], corpus: CorpusAccess) -> pa.RecordBatch:
        members: dict[str, list[str]] = {}
        for batch in signatures:
            for document_id, start in zip(batch["id"].to_pylist(), batch["start"].to_pylist(), strict=True):
                members.setdefault(start, []).append(document_id)
        rows = [
            {"id": member, "cluster": min(cluster)}
            for cluster in members.values()
            if len(cluster) > 1
            for member in cluster
        ]
        return pa.RecordBatch.from_pylist(rows, pa.schema([("id", pa.string()), ("cluster", pa.string())]))


RULES: list[Any] = [
    {"drop": {"column": "count_words.words", "below": {"text": 4, "*": 2}}},
    {
        "keep_one": {
            "column": "same_start.cluster",
            "prefer": [{"column": "count_words.words", "order": "highest"}],
        }
    },
    {"mask": {"column": "count_words.longest"}},
]


SMALL_SHARDS = 100
"""So small that some are finished between two kills, whatever the ids that end them."""


def config(source: Path, **changed: Any) -> BuildConfig:
    """A build over JSON lines."""
    data: dict[str, Any] = {
        "name": "tests",
        "sources": [{"jsonl": {"path": str(source), "name": "lines"}}],
        "steps": ["count_words", "same_start"],
        "rules": RULES,
        "shard_bytes": 600,
    }
    return build_from(data | changed, "tests")


def built(build: BuildConfig, store: Path, executor: Executor | None = None, batch_rows: int = 512) -> Built:
    """Build, quietly."""
    with executor or LocalExecutor(1) as running, Progress(quiet=True) as progress:
        return Builder(Store(store), running, progress, batch_rows=batch_rows).build(build)


def build_slowly(source: str, store: str, workers: int, counting_file: str) -> None:
    """A build that takes a while, in a process that is going to be killed."""
    os.setpgrp()
    steps = [{"count_words": {"wait_s": 0.003, "counting_file": counting_file}}, "same_start"]
    build = config(Path(source), steps=steps, shard_bytes=SMALL_SHARDS)
    built(build, Path(store), LocalExecutor(workers), batch_rows=4)
