"""Tokens on disk and in memory: sharded Parquet with one row per document, and the flat arrays it opens as.

    TokenRow --write_tokens--> tokens-00000.parquet, ...
    tokens-*.parquet --TokenDataset.open--> id_N, byte_N, weight_N, offset_D, ...

A row keeps the document's id, slice and source beside its tokens, so that every number that is later computed
for a token can be added up by document, slice or source. It also keeps the document's group, the unit that a
split draws: documents of one group are not independent, and intervals are clustered by it. Each token carries
the bytes of text it stands for (bits per byte are exact sums) and its weight as a target (0: context alone,
as a prompt is).

Whatever else an objective reads is a named column: one number per token (a reference's log-probability, an
advantage), which like the weight belongs to the token as a target, or one number per document (a side of a
pair, a margin). Rows of one unit, such as the two sides of a pair, are read together: packing keeps them side
by side.

The first token of a document is never a target: its weight is 0. The dataset is held in memory, 12 bytes per
token; larger than memory is left out.

Shape legend: N tokens of all documents, D documents, S slices.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from gyrocompass.core.errors import BadInput

IntArray = npt.NDArray[np.integer[Any]]
FloatArray = npt.NDArray[np.floating[Any]]

TOKEN_SCHEMA = pa.schema(
    [
        ("document_id", pa.string()),
        ("slice", pa.string()),
        ("source", pa.string()),
        ("ids", pa.list_(pa.int32())),
        ("byte_counts", pa.list_(pa.int32())),
        ("weights", pa.list_(pa.float32())),
        ("group", pa.string()),
        ("unit", pa.string()),
        ("columns", pa.map_(pa.string(), pa.list_(pa.float32()))),
        ("labels", pa.map_(pa.string(), pa.float32())),
    ]
)

_ROW_GROUP_TOKENS = 2**20
_SHARD_TOKENS = 2**26


class TokenRow(NamedTuple):
    """One document as tokens."""

    document_id: str
    slice: str
    source: str
    ids: Sequence[int] | IntArray
    byte_counts: Sequence[int] | IntArray
    """Bytes of text that each token stands for; 0 for special tokens."""
    weights: Sequence[float] | FloatArray
    """The weight of each token as a target; the first is written as 0."""
    group: str = ""
    """What a split draws as one (the document's `split_key`); "": the document is a group of its own."""
    unit: str = ""
    """What is read together: rows of one unit follow each other; "": the row is a unit of its own."""
    columns: Mapping[str, Sequence[float] | FloatArray] = MappingProxyType({})
    """Numbers per token by name, as long as `ids`: each belongs to the token as a target."""
    labels: Mapping[str, float] = MappingProxyType({})
    """Numbers of the whole document by name."""


@dataclass
class TokenCounts:
    """What was written; additive."""

    documents: int = 0
    tokens: int = 0
    targets: int = 0
    bytes: int = 0


def write_tokens(
    folder: Path,
    rows: Iterable[TokenRow],
    *,
    row_group_tokens: int = _ROW_GROUP_TOKENS,
    shard_tokens: int = _SHARD_TOKENS,
) -> TokenCounts:
    """Write rows as `tokens-00000.parquet` and so on, one row group in memory at a time.

    Args:
        folder: an existing folder.
        rows: the documents, in the order the dataset will keep.
        row_group_tokens: tokens after which a row group is closed.
        shard_tokens: tokens after which a new file is begun.
    """
    counts = TokenCounts()
    writer: pq.ParquetWriter | None = None
    shard, in_shard = 0, 0
    for table, n_tokens in _tables(rows, counts, row_group_tokens):
        if writer is None:
            path = folder / f"tokens-{shard:05d}.parquet"
            writer = pq.ParquetWriter(path, TOKEN_SCHEMA, compression="zstd")
        writer.write_table(table)
        in_shard += n_tokens
        if in_shard >= shard_tokens:
            writer.close()
            writer, shard, in_shard = None, shard + 1, 0
    if writer is not None:
        writer.close()
    elif shard == 0:
        pq.write_table(TOKEN_SCHEMA.empty_table(), folder / "tokens-00000.parquet")
    return counts


def _tables(
    rows: Iterable[TokenRow], counts: TokenCounts, row_group_tokens: int
) -> Iterator[tuple[pa.Table, int]]:
    """Row groups with their token counts; adds up `counts` on the way."""
    buffered: list[TokenRow] = []
    n_tokens = 0
    for row in rows:
        buffered.append(row)
        n_tokens += len(row.ids)
        if n_tokens >= row_group_tokens:
            yield _table(buffered, counts), n_tokens
            buffered, n_tokens = [], 0
    if buffered:
        yield _table(buffered, counts), n_tokens


def _table(rows: Sequence[TokenRow], counts: TokenCounts) -> pa.Table:
    dataset = TokenDataset.of(rows)
    counts.documents += dataset.n_documents
    counts.tokens += dataset.n_tokens
    counts.targets += dataset.n_targets
    counts.bytes += int(dataset.byte_N.sum())
    offsets = pa.array(dataset.offset_D, pa.int32())
    columns = [
        pa.array([row.document_id for row in rows], pa.string()),
        pa.array([row.slice for row in rows], pa.string()),
        pa.array([row.source for row in rows], pa.string()),
        *(
            pa.ListArray.from_arrays(offsets, pa.array(values))
            for values in (dataset.id_N, dataset.byte_N, dataset.weight_N)
        ),
        pa.array(dataset.groups, pa.string()),
        pa.array([row.unit for row in rows], pa.string()),
        pa.array([_columns(row) for row in rows], TOKEN_SCHEMA.field("columns").type),
        pa.array([list(row.labels.items()) for row in rows], TOKEN_SCHEMA.field("labels").type),
    ]
    return pa.Table.from_arrays(columns, schema=TOKEN_SCHEMA)


def _columns(row: TokenRow) -> list[tuple[str, Any]]:
    """The columns of a row, as Arrow takes a mapping."""
    return [(name, np.asarray(values, np.float32)) for name, values in row.columns.items()]


@dataclass(frozen=True)
class TokenDataset:
    """The tokens of all documents, flat: document d's are `id_N[offset_D[d]:offset_D[d + 1]]`."""

    id_N: IntArray
    """int32: token ids."""
    byte_N: IntArray
    """int32: bytes of text each token stands for."""
    weight_N: FloatArray
    """float32, >= 0: weight as a target; 0 at the first token of each document."""
    offset_D: IntArray
    """int64, one more than there are documents."""
    document_ids: tuple[str, ...]
    groups: tuple[str, ...]
    """Each document's group; its id where it is a group of its own."""
    slice_D: IntArray
    """int32: index into `slice_names`."""
    source_D: IntArray
    """int32: index into `source_names`."""
    slice_names: tuple[str, ...]
    """Sorted."""
    source_names: tuple[str, ...]
    """Sorted."""
    unit_D: IntArray
    """int32, ascending: documents with one number are read together."""
    whole_D: npt.NDArray[np.bool_]
    """Whether a document is of a named unit: such a one is never cut."""
    columns: Mapping[str, FloatArray] = field(default_factory=dict)
    """float32 [N] by name; NaN where a document has no such column."""
    labels: Mapping[str, FloatArray] = field(default_factory=dict)
    """float32 [D] by name; NaN where a document has no such label."""

    @classmethod
    def of(cls, rows: Iterable[TokenRow]) -> TokenDataset:
        """A dataset in memory, without a file.

        >>> row = TokenRow("d0", "code", "files", [0, 5, 6, 0], [0, 1, 2, 0], [1, 1, 1, 1])
        >>> dataset = TokenDataset.of([row])
        >>> dataset.n_documents, dataset.n_tokens, dataset.n_targets
        (1, 4, 3)
        """
        rows = list(rows)
        lengths = [len(row.ids) for row in rows]
        for row in rows:
            for name, values in row.columns.items():
                assert len(values) == len(row.ids), f"column {name} of {row.document_id}"
        return cls._build(
            [_flat([row.ids for row in rows], np.int32)],
            [_flat([row.byte_counts for row in rows], np.int32)],
            [_flat([row.weights for row in rows], np.float32)],
            [np.array(lengths, np.int64)],
            _Names(*([getattr(row, name) for row in rows] for name in _Names._fields)),
            _columns_of(lengths, [row.columns for row in rows]),
            _labels_of([row.labels for row in rows]),
        )

    @classmethod
    def open(cls, folder: Path) -> TokenDataset:
        """Read what `write_tokens` wrote; files from before groups were kept have each document on its own.

        Raises:
            BadInput: the folder holds no `tokens-*.parquet`.
        """
        paths = sorted(folder.glob("tokens-*.parquet"))
        if not paths:
            raise BadInput("no tokens here", where=folder, fix="give the folder of a tokens stage")
        tables = [pq.read_table(path, schema=TOKEN_SCHEMA) for path in paths]
        chunks = [batch for table in tables for batch in table.to_batches()]
        return cls._build(
            [chunk["ids"].flatten().to_numpy() for chunk in chunks],
            [chunk["byte_counts"].flatten().to_numpy() for chunk in chunks],
            [chunk["weights"].flatten().to_numpy() for chunk in chunks],
            [chunk["ids"].value_lengths().to_numpy().astype(np.int64) for chunk in chunks],
            _Names(*([n for chunk in chunks for n in chunk[name].to_pylist()] for name in _Names._fields)),
            _columns_of(
                np.concatenate(
                    [np.empty(0, np.int64), *(c["ids"].value_lengths().to_numpy() for c in chunks)]
                ),
                [dict(row or ()) for chunk in chunks for row in chunk["columns"].to_pylist()],
            ),
            _labels_of([dict(row or ()) for chunk in chunks for row in chunk["labels"].to_pylist()]),
        )

    @classmethod
    def _build(
        cls,
        ids: list[IntArray],
        byte_counts: list[IntArray],
        weights: list[FloatArray],
        lengths: list[IntArray],
        names: _Names,
        columns: Mapping[str, FloatArray],
        labels: Mapping[str, FloatArray],
    ) -> TokenDataset:
        id_N = np.concatenate([np.empty(0, np.int32), *ids])
        byte_N = np.concatenate([np.empty(0, np.int32), *byte_counts])
        weight_N = np.concatenate([np.empty(0, np.float32), *weights])
        length_D = np.concatenate([np.empty(0, np.int64), *lengths])
        offset_D = np.concatenate([np.zeros(1, np.int64), np.cumsum(length_D)])
        assert len(id_N) == len(byte_N) == len(weight_N) == offset_D[-1], "columns of unequal length"
        assert np.all(length_D > 0), "a document without tokens"
        assert np.all(np.isfinite(weight_N)) and np.all(weight_N >= 0), "weights are finite and not negative"
        weight_N[offset_D[:-1]] = 0
        slice_names, slice_D = _index(names.slice)
        source_names, source_D = _index(names.source)
        return cls(
            id_N,
            byte_N,
            weight_N,
            offset_D,
            tuple(names.document_id),
            tuple(group or own for group, own in zip(names.group, names.document_id, strict=True)),
            slice_D,
            source_D,
            slice_names,
            source_names,
            _units(names.unit),
            np.array([bool(unit) for unit in names.unit], np.bool_),
            columns,
            labels,
        )

    def with_column(self, name: str, values_N: FloatArray) -> TokenDataset:
        """The dataset with one more column, or with one put in the place of an old one."""
        assert values_N.shape == self.id_N.shape, "a column has a number per token"
        return replace(self, columns={**self.columns, name: values_N.astype(np.float32)})

    def rows(self) -> Iterator[TokenRow]:
        """The documents again, as they were written."""
        for d, document_id in enumerate(self.document_ids):
            own = slice(int(self.offset_D[d]), int(self.offset_D[d + 1]))
            columns = {name: values[own] for name, values in self.columns.items()}
            labels = {name: float(values[d]) for name, values in self.labels.items()}
            yield TokenRow(
                document_id,
                self.slice_names[self.slice_D[d]],
                self.source_names[self.source_D[d]],
                self.id_N[own],
                self.byte_N[own],
                self.weight_N[own],
                self.groups[d],
                f"unit-{self.unit_D[d]}" if self.whole_D[d] else "",
                {name: values for name, values in columns.items() if not np.isnan(values).all()},
                {name: value for name, value in labels.items() if not np.isnan(value)},
            )

    @property
    def n_documents(self) -> int:
        """Documents."""
        return len(self.document_ids)

    @property
    def n_tokens(self) -> int:
        """Tokens, context and special ones included."""
        return len(self.id_N)

    @cached_property
    def n_targets(self) -> int:
        """Tokens that are counted: those with a weight above 0."""
        return int(np.count_nonzero(self.weight_N))

    def tokens_by_slice(self) -> dict[str, int]:
        """Tokens by slice name; they add up to `n_tokens`."""
        return self._by_slice(np.ones(self.n_tokens, dtype=np.bool_))

    def targets_by_slice(self) -> dict[str, int]:
        """Counted tokens by slice name; they add up to `n_targets`."""
        return self._by_slice(self.weight_N > 0)

    def _by_slice(self, chosen_N: npt.NDArray[np.bool_]) -> dict[str, int]:
        slice_N = np.repeat(self.slice_D, np.diff(self.offset_D))
        counted_S = np.bincount(slice_N[chosen_N], minlength=len(self.slice_names))
        return dict(zip(self.slice_names, counted_S.tolist(), strict=True))


class _Names(NamedTuple):
    """The names of all documents, column by column; the fields are those of the schema."""

    document_id: list[str]
    slice: list[str]
    source: list[str]
    group: list[str | None]
    unit: list[str | None]


def _units(names: Sequence[str | None]) -> IntArray:
    """The number of each row's unit: rows that follow each other under one name share it."""
    begins_D = np.array(
        [not name or name != before for name, before in zip(names, [None, *names], strict=False)], np.bool_
    )
    return (np.cumsum(begins_D) - 1).astype(np.int32)


def _columns_of(
    lengths: Sequence[int] | IntArray, rows: Sequence[Mapping[str, Any]]
) -> dict[str, FloatArray]:
    """Each column over all tokens; NaN in a row without it."""
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.asarray(lengths, np.int64))])
    found: dict[str, FloatArray] = {}
    for row, columns in enumerate(rows):
        for name, values in columns.items():
            if name not in found:
                found[name] = np.full(int(offsets[-1]), np.nan, np.float32)
            found[name][offsets[row] : offsets[row + 1]] = values
    return dict(sorted(found.items()))


def _labels_of(rows: Sequence[Mapping[str, float]]) -> dict[str, FloatArray]:
    """Each label over all documents; NaN in a row without it."""
    return _columns_of([1] * len(rows), [{name: [v] for name, v in row.items()} for row in rows])


def _flat(parts: Sequence[Sequence[float] | IntArray | FloatArray], dtype: type[Any]) -> Any:
    return np.concatenate([np.empty(0, dtype), *(np.asarray(part, dtype) for part in parts)])


def _index(names: Sequence[str]) -> tuple[tuple[str, ...], IntArray]:
    """The sorted distinct names, and each entry's index among them."""
    distinct = tuple(sorted(set(names)))
    place = {name: index for index, name in enumerate(distinct)}
    return distinct, np.array([place[name] for name in names], np.int32)
