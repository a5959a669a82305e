"""What differs between two data sets: documents that came, went or changed, and how the slices moved.

    diff(A, B) --> Difference

A document is the same if its id and all its fields are (its leaf in the Merkle tree). One that has the same
source and path in both but another content or other fields is changed; what is left came or went. Equal roots
end the comparison at once. Texts are not read.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gyrocompass.data.curate.dataset import LEAVES, LEDGER, STATISTICS, document_batches
from gyrocompass.data.curate.versions import read_facts

_COLUMNS = ["id", "source", "path", "slice", "licence", "language", "content_hash"]


class Row(NamedTuple):
    """A document on one side."""

    id: str
    source: str
    path: str
    slice: str
    why: str | None = None
    """The rule that dropped it on the other side, where the other side read it."""


class Changed(NamedTuple):
    """A document of one name that is not the same on both sides."""

    before: Row
    after: Row
    fields: tuple[str, ...]
    """What is not the same."""


class SliceSums(NamedTuple):
    """A slice on both sides."""

    slice: str
    documents_before: int
    documents_after: int
    bytes_before: int
    bytes_after: int


class Difference(NamedTuple):
    """What differs."""

    root_before: str
    root_after: str
    removed: list[Row]
    added: list[Row]
    changed: list[Changed]
    slices: list[SliceSums]

    @property
    def same(self) -> bool:
        """Whether both hold the same documents."""
        return self.root_before == self.root_after


def diff(before: Path, after: Path) -> Difference:
    """Compare the folders of two data sets.

    Memory: the ids and leaves of both, and the rows that differ.
    """
    roots = read_facts(before)["root"], read_facts(after)["root"]
    slices = _slices(before, after)
    if roots[0] == roots[1]:
        return Difference(*roots, [], [], [], slices)
    leaves = [pq.read_table(folder / LEAVES) for folder in (before, after)]
    gone = _rows(before, _only(leaves[0], leaves[1]))
    new = _rows(after, _only(leaves[1], leaves[0]))
    after_by_name = {(row["source"], row["path"]): row for row in new}
    changed, removed = [], []
    for row in gone:
        other = after_by_name.pop((row["source"], row["path"]), None)
        if other is None:
            removed.append(row)
        else:
            changed.append(Changed(_row(row), _row(other), _unequal(row, other)))
    why_removed, why_added = _dropped(after, removed), _dropped(before, list(after_by_name.values()))
    return Difference(
        *roots,
        [_row(row, why_removed) for row in removed],
        [_row(row, why_added) for row in after_by_name.values()],
        changed,
        slices,
    )


def _only(leaves: pa.Table, others: pa.Table) -> set[str]:
    """Ids of the leaves that are not, as they are, among the others."""
    at = pc.index_in(leaves["fields"], others["fields"])
    return set(leaves.filter(pc.is_null(at))["id"].to_pylist())


def _rows(folder: Path, ids: set[str]) -> list[dict[str, Any]]:
    wanted = pa.array(sorted(ids), pa.string())
    return [
        row
        for batch in document_batches(folder, _COLUMNS)
        for row in batch.filter(pc.is_in(batch["id"], wanted)).to_pylist()
    ]


def _row(row: dict[str, Any], why: dict[tuple[str, str], str] | None = None) -> Row:
    said = None if why is None else why.get((row["source"], row["path"]))
    return Row(row["id"], row["source"], row["path"], row["slice"], said)


def _unequal(before: dict[str, Any], after: dict[str, Any]) -> tuple[str, ...]:
    names = {"content_hash": "content"}
    found = [names.get(name, name) for name in _COLUMNS[3:] if before[name] != after[name]]
    return tuple(found) or ("other fields",)


def _dropped(folder: Path, rows: list[dict[str, Any]]) -> dict[tuple[str, str], str]:
    """Why a side that read these documents does not have them, by source and path."""
    names = {(row["source"], row["path"]) for row in rows}
    if not names:
        return {}
    ledger = pq.read_table(folder / LEDGER, columns=["source", "path", "title", "value"])
    found = {}
    for batch in ledger.to_batches(max_chunksize=4096):
        for row in batch.to_pylist():
            if (row["source"], row["path"]) in names:
                found[row["source"], row["path"]] = f"{row['title']} (it is {row['value']})"
    return found


def _slices(before: Path, after: Path) -> list[SliceSums]:
    sums = []
    for folder in (before, after):
        documents, n_bytes = Counter[str](), Counter[str]()
        for row in pq.read_table(folder / STATISTICS).to_pylist():
            documents[row["slice"]] += row["documents"]
            n_bytes[row["slice"]] += row["bytes"]
        sums.append((documents, n_bytes))
    (documents_before, bytes_before), (documents_after, bytes_after) = sums
    return [
        SliceSums(name, documents_before[name], documents_after[name], bytes_before[name], bytes_after[name])
        for name in sorted({*documents_before, *documents_after})
    ]
