"""The ledger: sums of token log-probabilities by tag, which add up and merge.

    log-probs of N tokens + tags --Ledger.add_tokens--> one row of `Sums` per (dimension, name)
    a ledger + a ledger          --Ledger.merge-------> the ledger of both

A dimension is a way of dividing the same tokens: `slice`, `source`, `document`, `group` (documents that were
drawn together), and `total`, which is one row and is always kept. Every counted token enters each dimension
once, so the rows of a dimension add up to the total (law 2). Objectives have a dimension of their own,
`objective`, weighted and in the objective's unit.

Only sums are kept, in float64: merging over steps, micro-batches and ranks is addition, counts are exact up
to 2^53, and a mean is taken by whoever prints it. A row of `document` or `group` also remembers the slice its
tokens were in, so that a ledger by itself yields intervals clustered by either within each slice
(`intervals.py`).

The sums of tokens are not weighted: `value` is the sum of NLL over the counted tokens (those with weight
above 0), which is what perplexity and bits per byte are made of; `weight` is kept beside it. The weighted
loss is the objective's row. What a step did not measure (entropy, rank) is not counted as 0: each has a count
of its own.

Left out on purpose: means, histograms and extremes, none of which can be merged exactly or at all.

Shape legend: N tokens of one call, R rows of a dimension, F fields of `Sums`.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike, NDArray

from gyrocompass.core.errors import BadInput, GyroError

Dimension = Literal["total", "slice", "source", "document", "group", "objective"]
TOTAL: Dimension = "total"
_KEEP_SLICE: tuple[Dimension, ...] = ("document", "group")
"""Dimensions whose rows remember the slice."""
Tag = tuple[ArrayLike, Sequence[str]]
"""For each of N tokens an index, and the names that the indices stand for."""

FloatArray = NDArray[np.float64]
IndexArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Sums:
    """One row of a ledger: everything in it adds up."""

    count: int
    """Counted tokens (of an objective: its terms)."""
    weight: float
    """Sum of their weights."""
    value: float
    """Sum of NLL in nats, not weighted (of an objective: sum of value * weight, in its own unit)."""
    value_sq: float
    """Sum of squared NLL, nats^2."""
    bytes: int
    """Bytes of text the tokens stand for."""
    top1_count: int
    """Tokens whose rank was measured."""
    top1: int
    """Of those, tokens that no other token scored above."""
    entropy_count: int
    """Tokens whose entropy was measured."""
    entropy: float
    """Sum of their entropies, nats."""


FIELDS = tuple(field.name for field in fields(Sums))
"""The columns of an array of sums [R, F]."""

_INTEGER_FIELDS = frozenset({"count", "bytes", "top1_count", "top1", "entropy_count"})
_SCHEMA = pa.schema(
    [("dimension", pa.string()), ("name", pa.string()), ("slice", pa.string())]
    + [(name, pa.int64() if name in _INTEGER_FIELDS else pa.float64()) for name in FIELDS],
    metadata={"gyrocompass.ledger": "1"},
)

_Key = tuple[str, str]  # name, and the slice it was in ("" where the dimension does not say)


class _Rows:
    """The rows of one dimension: keys in order of arrival and their sums [R, F]."""

    def __init__(self) -> None:
        self.index: dict[_Key, int] = {}
        self._sums_RF: FloatArray = np.zeros((0, len(FIELDS)))

    @property
    def sums_RF(self) -> FloatArray:
        """The sums of the rows in use."""
        return self._sums_RF[: len(self.index)]

    def add(self, keys: Sequence[_Key], sums_RF: FloatArray) -> None:
        """Add one row of sums per key; keys may repeat and may be new."""
        row_R = np.array([self.index.setdefault(key, len(self.index)) for key in keys], dtype=np.int64)
        missing = len(self.index) - len(self._sums_RF)
        if missing > 0:
            more = max(missing, len(self._sums_RF), 8)
            self._sums_RF = np.concatenate([self._sums_RF, np.zeros((more, len(FIELDS)))])
        np.add.at(self._sums_RF, row_R, sums_RF)


class Ledger:
    """Mergeable sums of token log-probabilities, keyed by (dimension, name).

    >>> ledger = Ledger()
    >>> ledger.add_tokens({"slice": ([0, 0, 1], ["code", "prose"])}, nll_N=[1.0, 2.0, 4.0], byte_N=[3, 1, 5])
    >>> ledger.sums("slice", "code").value, ledger.total.count, ledger.total.bytes
    (3.0, 3, 9)
    """

    def __init__(self) -> None:
        self._dimensions: dict[str, _Rows] = {}

    def add_tokens(
        self,
        tags: Mapping[Dimension, Tag],
        nll_N: ArrayLike,
        *,
        weight_N: ArrayLike | None = None,
        byte_N: ArrayLike | None = None,
        top1_N: ArrayLike | None = None,
        entropy_N: ArrayLike | None = None,
    ) -> None:
        """Add N tokens to every dimension of `tags`, and to the total.

            row[name].value += sum of nll over the counted tokens with that name

        Args:
            tags: for each dimension the tokens' indices [N] and the names they index. Only counted tokens are
                looked up, so padding may carry -1.
            nll_N: negative log-probabilities, nats.
            weight_N: weights; a token counts if and only if its weight is above 0. None: each weighs 1.
            byte_N: bytes of text each token stands for. None: 0.
            top1_N: whether no other token scored above the target. None: not measured.
            entropy_N: entropies of the predicted distributions, nats. None: not measured.

        Raises:
            GyroError: a counted token's NLL (or entropy) is NaN or infinite; nothing is added and its
                document is named. A model that gives a token that occurred probability 0 has no perplexity.
        """
        nll_N = np.asarray(nll_N, dtype=np.float64)
        weight_N = np.ones(len(nll_N)) if weight_N is None else np.asarray(weight_N, dtype=np.float64)
        counted_N = np.flatnonzero(weight_N > 0)
        if len(counted_N) == 0:
            return
        columns = [np.ones(len(counted_N)), weight_N[counted_N], nll_N[counted_N], nll_N[counted_N] ** 2]
        columns.append(np.zeros(len(counted_N)) if byte_N is None else _taken(byte_N, counted_N))
        columns += _measured(top1_N, counted_N) + _measured(entropy_N, counted_N)
        fields_NF = np.stack(columns, axis=1)
        looked_up = {
            dimension: (np.asarray(index_N, dtype=np.int64)[counted_N], names)
            for dimension, (index_N, names) in tags.items()
        }
        if not np.isfinite(fields_NF).all():
            raise _not_finite(fields_NF, looked_up)
        self._rows(TOTAL).add([(TOTAL, "")], fields_NF.sum(axis=0, keepdims=True))
        for dimension, tag in looked_up.items():
            slices = looked_up.get("slice") if dimension in _KEEP_SLICE else None
            self._rows(dimension).add(*_grouped(tag, slices, fields_NF))

    def add_objective(self, name: str, value_sum: float, weight_sum: float, count: int) -> None:
        """Add an objective's sums: of value * weight, of weight, and the number of terms with weight above 0.

        Raises:
            GyroError: a sum is NaN or infinite.
        """
        if not np.isfinite([value_sum, weight_sum]).all():
            raise GyroError(
                f"objective {name!r} summed to {value_sum} (weights: {weight_sum})",
                fix="look at the per-document NLL of this step: the guard names the documents",
            )
        row = Sums(count, weight_sum, value_sum, 0.0, 0, 0, 0, 0, 0.0)
        self._rows("objective").add([(name, "")], np.array([astuple(row)], dtype=np.float64))

    def merge(self, other: Ledger) -> None:
        """Add everything in `other` to this ledger."""
        for dimension, rows in other._dimensions.items():
            # A copy, because `other` may be this ledger itself.
            self._rows(dimension).add(list(rows.index), rows.sums_RF.copy())

    @property
    def total(self) -> Sums:
        """The sums over every counted token."""
        return self.sums(TOTAL, TOTAL)

    def dimensions(self) -> list[str]:
        """The dimensions that have rows."""
        return sorted(self._dimensions)

    def names(self, dimension: Dimension) -> list[str]:
        """The names in a dimension, sorted."""
        return sorted({name for name, _ in self._index(dimension)})

    def sums(self, dimension: Dimension, name: str) -> Sums:
        """The sums of one name; all zero where nothing was counted."""
        rows = [row for key, row in self._index(dimension).items() if key[0] == name]
        return _sums(self._dimensions[dimension].sums_RF[rows].sum(axis=0)) if rows else Sums(*[0] * 9)

    def items(self, dimension: Dimension) -> Iterator[tuple[str, Sums]]:
        """Every name of a dimension with its sums, sorted by name."""
        names, sums_RF = self.columns(dimension)
        for name, row_F in zip(names, sums_RF, strict=True):
            yield name, _sums(row_F)

    def columns(self, dimension: Dimension, within_slice: str | None = None) -> tuple[list[str], FloatArray]:
        """A dimension as arrays: its names (sorted) and their sums [R, F], columns in the order of `FIELDS`.

        `within_slice` keeps the part of each row that was in that slice (of `document` and `group` only).
        """
        assert within_slice is None or dimension in _KEEP_SLICE, f"rows of {dimension} forget their slice"
        keys = [key for key in self._index(dimension) if within_slice in (None, key[1])]
        names = sorted({name for name, _ in keys})
        row_of = {name: row for row, name in enumerate(names)}
        sums_RF: FloatArray = np.zeros((len(names), len(FIELDS)))
        if keys:
            rows = self._dimensions[dimension]
            np.add.at(
                sums_RF, [row_of[name] for name, _ in keys], rows.sums_RF[[rows.index[key] for key in keys]]
            )
        return names, sums_RF

    def to_table(self) -> pa.Table:
        """Every row, sorted by dimension, name and slice; exact."""
        keyed = sorted(
            (dimension, *key, row)
            for dimension, rows in self._dimensions.items()
            for key, row in rows.index.items()
        )
        columns: dict[str, Any] = {
            "dimension": [entry[0] for entry in keyed],
            "name": [entry[1] for entry in keyed],
            "slice": [entry[2] for entry in keyed],
        }
        sums = [_sums(self._dimensions[entry[0]].sums_RF[entry[3]]) for entry in keyed]
        columns |= {name: [getattr(row, name) for row in sums] for name in FIELDS}
        return pa.Table.from_pydict(columns, schema=_SCHEMA)

    @classmethod
    def from_table(cls, table: pa.Table) -> Ledger:
        """The ledger that `to_table` gave.

        Raises:
            BadInput: the table is not a ledger's.
        """
        if not table.schema.equals(_SCHEMA) or (table.schema.metadata or {}) != _SCHEMA.metadata:
            raise BadInput(
                f"this table is not a ledger: its columns are {', '.join(table.column_names)}",
                fix=f"a ledger of this version has {', '.join(_SCHEMA.names)}",
            )
        ledger = cls()
        dimension_R, *key_R = (table.column(name).to_pylist() for name in ("dimension", "name", "slice"))
        keys = list(zip(*key_R, strict=True))
        sums_RF = np.stack([table.column(name).to_numpy().astype(np.float64) for name in FIELDS], axis=1)
        for dimension in dict.fromkeys(dimension_R):
            rows = [row for row, name in enumerate(dimension_R) if name == dimension]
            ledger._rows(dimension).add([keys[row] for row in rows], sums_RF[rows])
        return ledger

    def to_bytes(self) -> bytes:
        """The ledger as the bytes of a Parquet file (how ranks send it to each other)."""
        buffer = io.BytesIO()
        pq.write_table(self.to_table(), buffer)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Ledger:
        """The ledger that `to_bytes` gave."""
        return cls.from_table(pq.read_table(io.BytesIO(data)))

    def save(self, path: Path) -> None:
        """Write the ledger as one Parquet file."""
        path.write_bytes(self.to_bytes())

    @classmethod
    def load(cls, path: Path) -> Ledger:
        """Read a ledger that `save` wrote.

        Raises:
            BadInput: the file is not there, is not Parquet, or is not a ledger.
        """
        try:
            return cls.from_bytes(path.read_bytes())
        except (OSError, pa.ArrowInvalid) as error:
            raise BadInput(f"cannot read a ledger: {error}", where=str(path)) from error

    def __eq__(self, other: object) -> bool:
        """Same rows, same sums, bit for bit; the order of arrival does not matter."""
        return isinstance(other, Ledger) and bool(self.to_table().equals(other.to_table()))

    __hash__ = None  # type: ignore[assignment]  # a ledger changes

    def _rows(self, dimension: str) -> _Rows:
        assert dimension in get_args(Dimension), f"no such dimension: {dimension}"
        return self._dimensions.setdefault(dimension, _Rows())

    def _index(self, dimension: str) -> dict[_Key, int]:
        return self._dimensions[dimension].index if dimension in self._dimensions else {}


def _taken(values: ArrayLike, counted_N: IndexArray) -> FloatArray:
    return np.asarray(values, dtype=np.float64)[counted_N]


def _measured(values: ArrayLike | None, counted_N: IndexArray) -> list[FloatArray]:
    """A measured column and its count column; both 0 where it was not measured."""
    if values is None:
        return [np.zeros(len(counted_N)), np.zeros(len(counted_N))]
    return [np.ones(len(counted_N)), _taken(values, counted_N)]


def _grouped(
    tag: tuple[IndexArray, Sequence[str]],
    slices: tuple[IndexArray, Sequence[str]] | None,
    fields_NF: FloatArray,
) -> tuple[list[_Key], FloatArray]:
    """Sum the tokens by name (and by slice, where given), in the tokens' order."""
    index_N, names = tag
    assert index_N.min() >= 0, "a counted token has no tag"
    if slices is None:
        value_R, row_N = np.unique(index_N, return_inverse=True)
        keys = [(names[value], "") for value in value_R]
    else:
        slice_N, slice_names = slices
        value_R, row_N = np.unique(index_N * len(slice_names) + slice_N, return_inverse=True)
        keys = [
            (names[value // len(slice_names)], slice_names[value % len(slice_names)]) for value in value_R
        ]
    sums = [np.bincount(row_N, weights=field_N, minlength=len(keys)) for field_N in fields_NF.T]
    return keys, np.stack(sums, axis=1)


def _not_finite(
    fields_NF: FloatArray, tags: Mapping[Dimension, tuple[IndexArray, Sequence[str]]]
) -> GyroError:
    bad_N = np.flatnonzero(~np.isfinite(fields_NF).all(axis=1))
    dimension: Dimension | None = next(
        (name for name in ("document", "source", "slice") if name in tags), None
    )
    where = None
    if dimension is not None:
        index_N, names = tags[dimension]
        found = list(dict.fromkeys(names[index] for index in index_N[bad_N]))
        where = (
            f"{dimension} " + ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
        )
    values = sorted({str(value) for value in fields_NF[bad_N, FIELDS.index("value")]})
    return GyroError(
        f"the NLL or entropy of {len(bad_N)} of {len(fields_NF)} tokens is not a finite number "
        f"(NLL: {', '.join(values[:3])})",
        where=where,
        fix="look at these tokens: NaN comes from broken weights or an overflow (use float32); "
        "an infinite NLL means that the model rules out a token that occurred",
    )


def _sums(row_F: FloatArray) -> Sums:
    values: dict[str, Any] = {
        name: int(value) if name in _INTEGER_FIELDS else float(value)
        for name, value in zip(FIELDS, row_F, strict=True)
    }
    return Sums(**values)
