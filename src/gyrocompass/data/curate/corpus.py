"""The corpus: every document that was read, in Parquet shards, and the annotations beside them.

    records --CorpusWriter--> corpus-00000.parquet, corpus-00001.parquet, ...
    Corpus(folder, annotations).batches(columns) --> pyarrow.RecordBatch, ...

A row is a document: what steps see (`BATCH_SCHEMA`), and the rest that makes it a `Document` again. The text
that steps see is all the document says, its parts joined by a blank line; spans are offsets in it. Row n of
the annotation file `00003.parquet` is about row n of `corpus-00003.parquet`.

Where a shard ends depends on the documents in it, not on those before: after each document with a chance of
its bytes over half the shard size, drawn by its id. A document more or less therefore changes a shard or two
and leaves the others as they were, and with them everything that was computed from them.

A batch never spans row groups, and a row group holds a few MiB of text, so that memory is bounded whatever
the number of rows asked for (one document alone may be larger).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gyrocompass.core.errors import BadInput
from gyrocompass.data.curate.step import BATCH_SCHEMA, join_batches
from gyrocompass.data.document import DOCUMENT_SCHEMA, Document, document_of, document_row

PART_SEPARATOR = "\n\n"
"""Between the parts of a document in what steps see."""

CORPUS_SCHEMA = pa.schema(
    [
        *BATCH_SCHEMA,
        ("answer", pa.large_string()),  # Document.text where the document says more than that
        *(field for field in DOCUMENT_SCHEMA if field.name not in BATCH_SCHEMA.names),
    ]
)

SHARD_BYTES = 16 * 2**20
BATCH_ROWS = 512
_ROW_GROUP_BYTES = 4 * 2**20


def corpus_row(document: Document) -> dict[str, Any]:
    """A document as a row of `CORPUS_SCHEMA`."""
    row = document_row(document)
    row |= {"text": PART_SEPARATOR.join(document.texts), "n_bytes": document.n_bytes}
    return row | {"answer": "" if document.kind == "text" else document.text}


def corpus_document(row: Mapping[str, Any]) -> Document:
    """The document of a row of `CORPUS_SCHEMA`."""
    fields = {name: row[name] for name in DOCUMENT_SCHEMA.names}
    if row["kind"] != "text":
        fields["text"] = row["answer"]
    return document_of(fields)


def batch_of(documents: Iterable[Document], schema: pa.Schema = BATCH_SCHEMA) -> pa.RecordBatch:
    """Documents as a batch, such as a step sees them.

    >>> document = Document(kind="text", text="x = 1", path="a.py", source="files", slice="code")
    >>> batch_of([document])["n_bytes"].to_pylist()
    [5]
    """
    rows = [{name: row[name] for name in schema.names} for row in map(corpus_row, documents)]
    return pa.RecordBatch.from_pylist(rows, schema)


class CorpusWriter:
    """Writes documents as shards, one row group in memory at a time.

    Args:
        folder: an existing folder.
        first: the number of the first shard.
        shard_bytes: about how many bytes of content a shard holds.
    """

    def __init__(self, folder: Path, *, first: int = 0, shard_bytes: int = SHARD_BYTES) -> None:
        self._folder, self._shard_bytes = folder, shard_bytes
        self._writer: pq.ParquetWriter | None = None
        self._rows: list[dict[str, Any]] = []
        self._group_bytes = self._bytes = 0
        self.shards = first
        """The number of the next shard."""

    def write(self, document: Document) -> None:
        """Add a document."""
        self._rows.append(corpus_row(document))
        self._group_bytes += document.n_bytes
        self._bytes += document.n_bytes
        if self._group_bytes >= _ROW_GROUP_BYTES:
            self._flush()
        if self._bytes >= self._shard_bytes // 2 and self._ends(document):
            self.close()

    def close(self) -> None:
        """End the current shard, if it holds anything."""
        self._flush()
        if self._writer is not None:
            self._writer.close()
            self._writer, self._bytes = None, 0
            self.shards += 1

    def _ends(self, document: Document) -> bool:
        chance = document.n_bytes / (self._shard_bytes / 2)
        return self._bytes >= 4 * self._shard_bytes or int(document.id, 16) / 2**64 < chance

    def _flush(self) -> None:
        if self._rows:
            if self._writer is None:
                path = self._folder / f"corpus-{self.shards:05d}.parquet"
                self._writer = pq.ParquetWriter(path, CORPUS_SCHEMA, compression="zstd")
            self._writer.write_table(pa.Table.from_pylist(self._rows, CORPUS_SCHEMA))
            self._rows, self._group_bytes = [], 0


class Corpus:
    """A corpus on disk with what steps said of it; see `CorpusAccess`.

    Args:
        folder: where the shards are.
        annotations: for each step's label, the folder with its annotations.
        batch_rows: the most documents in a batch.

    Raises:
        BadInput: there are no shards.
    """

    def __init__(
        self, folder: Path, annotations: Mapping[str, Path] | None = None, batch_rows: int = BATCH_ROWS
    ) -> None:
        self.folder, self.annotations, self._batch_rows = folder, dict(annotations or {}), batch_rows
        self.shards = sorted(folder.glob("corpus-*.parquet"))
        if not self.shards:
            raise BadInput("no corpus here", where=folder, fix="give the folder of a corpus artifact")

    @cached_property
    def rows(self) -> tuple[int, ...]:
        """Documents in each shard."""
        return tuple(pq.read_metadata(path).num_rows for path in self.shards)

    @property
    def n_documents(self) -> int:
        """See `CorpusAccess`."""
        return sum(self.rows)

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """See `CorpusAccess`; any column of `CORPUS_SCHEMA` may be asked for."""
        for shard in range(len(self.shards)):
            yield from self.shard_batches(shard, columns)

    def shard_batches(self, shard: int, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """The documents of one shard."""
        columns = list(BATCH_SCHEMA.names if columns is None else columns)
        own = [name for name in columns if name in CORPUS_SCHEMA.names]
        notes = self._notes(shard, [name for name in columns if name not in own])
        with pq.ParquetFile(self.shards[shard]) as file:
            place = 0
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=own or ["id"])
                for name, column in notes.items():
                    table = table.append_column(name, column.slice(place, table.num_rows))
                place += table.num_rows
                yield from table.select(columns).combine_chunks().to_batches(self._batch_rows)

    def take(self, ids: Iterable[str], columns: Sequence[str] | None = None) -> pa.RecordBatch:
        """See `CorpusAccess`; row groups that hold none of the documents are not read."""
        columns = list(BATCH_SCHEMA.names if columns is None else columns)
        wanted = [self._place(document_id) for document_id in ids]
        found: dict[tuple[int, int], pa.RecordBatch] = {}
        by_shard: dict[int, list[int]] = {}
        for shard, row in sorted(set(wanted)):
            by_shard.setdefault(shard, []).append(row)
        for shard, rows in by_shard.items():
            for row, record in zip(rows, self._rows_of(shard, rows, columns), strict=True):
                found[shard, row] = record
        schema = next(iter(found.values())).schema if found else self._schema(columns)
        return join_batches([found[place] for place in wanted], schema)

    def _rows_of(self, shard: int, rows: Sequence[int], columns: list[str]) -> Iterator[pa.RecordBatch]:
        """Single rows of a shard, ascending."""
        own = [name for name in columns if name in CORPUS_SCHEMA.names]
        notes = self._notes(shard, [name for name in columns if name not in own])
        with pq.ParquetFile(self.shards[shard]) as file:
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            begins = np.concatenate([[0], np.cumsum(sizes)])
            group, table = -1, None
            for row in rows:
                inside = int(np.searchsorted(begins, row, side="right")) - 1
                if inside != group:
                    group, table = inside, file.read_row_group(inside, columns=own or ["id"])
                assert table is not None
                one = table.slice(row - int(begins[group]), 1)
                for name, column in notes.items():
                    one = one.append_column(name, column.slice(row, 1))
                chosen = one.select(columns)
                yield join_batches(chosen.to_batches(), chosen.schema)

    def _notes(self, shard: int, names: Sequence[str]) -> dict[str, pa.ChunkedArray]:
        """Annotation columns of a shard by `<label>.<column>`."""
        notes: dict[str, pa.ChunkedArray] = {}
        for name in names:
            label, _, column = name.partition(".")
            table = pq.read_table(annotation_path(self.annotations[label], shard), columns=[column])
            notes[name] = table[column]
        return notes

    def _schema(self, columns: Sequence[str]) -> pa.Schema:
        return next(self.shard_batches(0, columns)).schema

    def _place(self, document_id: str) -> tuple[int, int]:
        """Shard and row of a document."""
        ids, places = self._index
        at = int(np.searchsorted(ids, np.uint64(int(document_id, 16))))
        assert at < len(ids) and int(ids[at]) == int(document_id, 16), f"not in the corpus: {document_id}"
        place = int(places[at])
        shard = int(np.searchsorted(self._begins, place, side="right")) - 1
        return shard, place - int(self._begins[shard])

    @cached_property
    def _begins(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        return np.concatenate([[0], np.cumsum(self.rows)]).astype(np.int64)

    @cached_property
    def _index(self) -> tuple[np.ndarray[Any, np.dtype[np.uint64]], np.ndarray[Any, np.dtype[np.int64]]]:
        """All ids as numbers, sorted, and where each stands: 16 bytes a document."""
        numbers = [id_numbers(batch["id"]) for batch in self.batches(["id"])]
        whole = np.concatenate([np.empty(0, np.uint64), *numbers])
        order = np.argsort(whole, kind="stable")
        return whole[order], order.astype(np.int64)


def id_numbers(ids: pa.Array) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Document ids as the numbers that their hexadecimal digits are."""
    return np.array([int(document_id, 16) for document_id in ids.to_pylist()], np.uint64)


def annotation_path(folder: Path, shard: int) -> Path:
    """The file with a step's annotations of one shard."""
    return folder / f"{shard:05d}.parquet"
