from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import pyarrow as pa
import pytest

from gyrocompass.core.errors import BadInput
from gyrocompass.data.curate.step import SPANS, CorpusAccess, GlobalStep, RecordStep, columns_of, step_types


class Shouting(RecordStep):
    name: ClassVar[str] = "shouting"

    def annotate(self, documents: pa.RecordBatch) -> pa.RecordBatch:
        loud = [text.isupper() for text in documents["text"].to_pylist()]
        places = [[{"start": 0, "end": 1, "kind": "x", "score": 1.0}] for _ in loud]
        return pa.RecordBatch.from_arrays(
            [documents["id"], pa.array(loud, pa.bool_()), pa.array(places, SPANS)], ["id", "loud", "places"]
        )


class Loudest(GlobalStep):
    name: ClassVar[str] = "loudest"

    def reads(self) -> tuple[str, ...]:
        return ("shouting.loud",)

    def signatures(self, documents: pa.RecordBatch) -> pa.RecordBatch:
        return documents.select(["id", "shouting.loud"])

    def resolve(self, signatures: Iterator[pa.RecordBatch], corpus: CorpusAccess) -> pa.RecordBatch:
        assert sum(batch.num_rows for batch in signatures) == corpus.n_documents
        return pa.RecordBatch.from_pylist([], pa.schema([("id", pa.string()), ("rank", pa.int64())]))


def test_columns_are_known_before_anything_runs() -> None:
    loud = columns_of(Shouting(), {})
    assert loud == {"loud": pa.bool_(), "places": SPANS}
    known = {f"shouting.{name}": kind for name, kind in loud.items()}
    assert columns_of(Loudest(), known) == {"rank": pa.int64()}


def test_a_step_that_reads_what_nobody_made_is_refused() -> None:
    with pytest.raises(BadInput, match=r"reads shouting\.loud, .*did you mean shouting\.lout"):
        columns_of(Loudest(), {"shouting.lout": pa.bool_()})


def test_every_registered_step_takes_an_empty_batch() -> None:
    for name, step in step_types().items():
        assert name == step.name
