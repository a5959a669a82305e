"""The data set: what was decided to stay, with the ledger of what was not and one hash over it all.

    verdicts + corpus --write_part, a shard each--> documents, leaves, what was covered, sums
    all parts --assemble--> documents-00000.parquet, ...    kept documents, in the order of the corpus
                            ledger.parquet                  why each other document is not there
                            covered.parquet                 documents with masks or pseudonyms, old id and new
                            quarantined.parquet             what could not be read
                            statistics.parquet              documents and bytes by slice, source, ...
                            dataset.json                    name, Merkle root, counts

`documents-*.parquet` have the columns of `Document`, so that `read_documents` reads them like any others. A
covered document is a new document (its id is that of its new content) derived from the one it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gyrocompass.core.folder import land, staging, sync
from gyrocompass.data.curate.corpus import CORPUS_SCHEMA, Corpus, corpus_document
from gyrocompass.data.curate.cover import Cover, Replacement, cover
from gyrocompass.data.curate.merkle import LEAF_FIELDS, Leaf, leaf
from gyrocompass.data.curate.pseudonym import Pseudonyms
from gyrocompass.data.curate.rules import Covering, Masking, Pseudonymising, Rule
from gyrocompass.data.curate.spans import Span
from gyrocompass.data.document import DOCUMENT_SCHEMA, document_row

LEDGER = "ledger.parquet"
COVERED = "covered.parquet"
LEAVES = "leaves.parquet"
STATISTICS = "statistics.parquet"

COVERED_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("new_id", pa.string()),
        ("path", pa.string()),
        ("source", pa.string()),
        ("slice", pa.string()),
        ("kinds", pa.map_(pa.string(), pa.int64())),
    ]
)
LEAF_SCHEMA = pa.schema([("id", pa.string()), ("fields", pa.binary(32))])
_ALL_ROWS = 2**31 - 1
_GROUPED = ["slice", "source", "licence", "language"]


class DatasetPart(NamedTuple):
    """One shard's share of a data set."""

    corpus: Path
    annotations: dict[str, Path]
    rules: tuple[Rule, ...]
    kept: npt.NDArray[np.bool_]
    """Which of the shard's documents stay."""
    shard: int
    target: Path


def write_part(part: DatasetPart) -> None:
    """Write what stays of a shard; the folder appears whole."""
    coverings = [rule.selected for rule in part.rules if isinstance(rule.selected, Covering)]
    replacements = [_replacement(covering) for covering in coverings]
    # Whole row groups, so that the bytes of the result do not depend on the size of batches.
    corpus = Corpus(part.corpus, part.annotations, _ALL_ROWS)
    columns = list(dict.fromkeys([*CORPUS_SCHEMA.names, *(covering.column for covering in coverings)]))
    covered: list[dict[str, Any]] = []
    place = 0
    with staging(part.target.parent) as folder:
        statistics: list[pa.Table] = []
        leaves: list[Leaf] = []
        with pq.ParquetWriter(folder / "documents.parquet", DOCUMENT_SCHEMA, compression="zstd") as writer:
            for batch in corpus.shard_batches(part.shard, columns):
                kept = batch.filter(pa.array(part.kept[place : place + batch.num_rows]))
                place += batch.num_rows
                rows, sizes = _covered_rows(kept, coverings, replacements, covered)
                writer.write_batch(rows)
                leaves += map(leaf, rows.select(LEAF_FIELDS).to_pylist())
                table = pa.Table.from_batches([rows.select(_GROUPED)]).append_column("bytes", sizes)
                statistics.append(table)
        pq.write_table(sums(pa.concat_tables(statistics)), folder / STATISTICS)
        pq.write_table(pa.Table.from_pylist(covered, COVERED_SCHEMA), folder / COVERED)
        pq.write_table(leaf_table(leaves), folder / LEAVES)
        sync(folder)
        land(folder, part.target, replace=False)


def sums(rows: pa.Table) -> pa.Table:
    """Documents and bytes by slice, source, licence and language, of rows or of sums."""
    counted = (
        rows
        if "documents" in rows.column_names
        else rows.append_column("documents", pa.array(np.ones(rows.num_rows, np.int64)))
    )
    added = counted.group_by(_GROUPED).aggregate([("documents", "sum"), ("bytes", "sum")])
    added = added.rename_columns([*_GROUPED, "documents", "bytes"])
    return added.sort_by([(name, "ascending") for name in _GROUPED])


def leaf_table(leaves: Sequence[Leaf]) -> pa.Table:
    """Leaves as a table."""
    columns = [pa.array([entry.id for entry in leaves], pa.string())]
    columns.append(pa.array([entry.fields for entry in leaves], pa.binary(32)))
    return pa.Table.from_arrays(columns, schema=LEAF_SCHEMA)


def read_leaves(folder: Path) -> list[Leaf]:
    """The leaves of a data set, by id."""
    table = pq.read_table(folder / LEAVES)
    return [*map(Leaf, table["id"].to_pylist(), table["fields"].to_pylist())]


def document_batches(folder: Path, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Columns of the kept documents, in their order."""
    for path in sorted(folder.glob("documents-*.parquet")):
        with pq.ParquetFile(path) as file:
            yield from file.iter_batches(columns=list(columns))


def _replacement(covering: Covering) -> Replacement:
    if isinstance(covering, Pseudonymising):
        return Pseudonyms(Path(covering.key_file)).seal
    assert isinstance(covering, Masking)
    by = covering.by
    return lambda span, text: by.replace("{kind}", span.kind)


def _covered_rows(
    kept: pa.RecordBatch,
    coverings: Sequence[Covering],
    replacements: Sequence[Replacement],
    covered: list[dict[str, Any]],
) -> tuple[pa.RecordBatch, pa.Array]:
    """Rows of `DOCUMENT_SCHEMA` with their bytes, spans covered; what was covered is noted."""
    rows, sizes = _document_columns(kept), kept["n_bytes"]
    changed: dict[int, dict[str, Any]] = {}
    new_sizes = {}
    covers = _covers(kept, coverings, replacements)
    for place, found in covers.items():
        before = corpus_document(kept.slice(place, 1).to_pylist()[0])
        after, kinds = cover(before, found)
        if not kinds:
            continue
        changed[place], new_sizes[place] = document_row(after), after.n_bytes
        facts = {"path": before.path, "source": before.source, "slice": before.slice}
        covered.append({"id": before.id, "new_id": after.id, **facts, "kinds": sorted(kinds.items())})
    if not changed:
        return rows, sizes
    new = pa.RecordBatch.from_pylist(list(changed.values()), DOCUMENT_SCHEMA)
    order = np.arange(rows.num_rows)
    order[list(changed)] = rows.num_rows + np.arange(len(changed))
    both = pa.Table.from_batches([rows, new]).combine_chunks().to_batches()[0]
    all_sizes = pa.concat_arrays([sizes, pa.array(list(new_sizes.values()), pa.int64())])
    return both.take(pa.array(order)), all_sizes.take(pa.array(order))


def _covers(
    kept: pa.RecordBatch, coverings: Sequence[Covering], replacements: Sequence[Replacement]
) -> dict[int, list[Cover]]:
    """The spans to cover in each row that has any, the first rule's first."""
    found: dict[int, list[Cover]] = {}
    for covering, by in zip(coverings, replacements, strict=True):
        inside = covering.in_slices(kept["slice"])
        filled = pc.fill_null(pc.list_value_length(kept[covering.column]), 0).to_numpy(zero_copy_only=False)
        for place in np.flatnonzero((filled > 0) & inside).tolist():
            for span in kept[covering.column][place].as_py():
                is_kind = covering.kinds is None or span["kind"] in covering.kinds
                score = span["score"]
                is_sure = (
                    covering.min_score is None or score is None or score >= np.float32(covering.min_score)
                )
                if is_kind and is_sure:
                    found.setdefault(place, []).append(Cover(Span(**span), by))
    return found


def _document_columns(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Corpus rows as rows of `DOCUMENT_SCHEMA`, without a detour through Python."""
    is_text = pc.equal(batch["kind"], "text")
    own_text = pc.if_else(is_text, batch["text"], batch["answer"]).cast(pa.string())
    columns = [own_text if name == "text" else batch[name] for name in DOCUMENT_SCHEMA.names]
    return pa.RecordBatch.from_arrays(columns, schema=DOCUMENT_SCHEMA)
