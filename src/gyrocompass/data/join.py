"""Packed rows of several datasets as rows of one, with a dataset that holds the documents they are of.

    (Packed, TokenDataset), (Packed, TokenDataset), ... --join--> Packed, TokenDataset

The joined dataset has the documents that its rows are cut from and no other, so its size is that of the
window however large the datasets are. Documents, units and segments are numbered on; slices and sources are
one list of names, in which equal names are one slice: who wants them apart renames them first (`under`). A
column that a dataset lacks is NaN there.

Shape legend: T positions of a batch, D documents, N tokens of a dataset.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from gyrocompass.data.pack import Float32Array, Int64Array, Packed
from gyrocompass.data.tokens import FloatArray, IntArray, TokenDataset


def under(name: str, dataset: TokenDataset) -> TokenDataset:
    """The dataset with slices and sources called `name/...`."""
    return replace(
        dataset,
        slice_names=tuple(f"{name}/{own}" for own in dataset.slice_names),
        source_names=tuple(f"{name}/{own}" for own in dataset.source_names),
    )


def join(parts: Sequence[tuple[Packed, TokenDataset]]) -> tuple[Packed, TokenDataset]:
    """The rows of all parts, in order.

    Args:
        parts: rows of one length, and the datasets they are of.

    Returns:
        The rows, and the documents that they are of.
    """
    lengths = {packed.length for packed, _ in parts}
    assert len(lengths) == 1, "rows of one length"
    seen = [_seen(packed, dataset) for packed, dataset in parts]
    datasets = [dataset for _, dataset in seen]
    slice_names, source_names = (
        tuple(sorted({name for dataset in datasets for name in getattr(dataset, field)}))
        for field in ("slice_names", "source_names")
    )
    renamed, documents, units, segments = [], 0, 0, 0
    for packed, dataset in seen:
        renamed.append(
            packed._replace(
                segment_T=_numbered_on(packed.segment_T, segments),
                document_T=_numbered_on(packed.document_T, documents),
                slice_T=_looked_up(packed.slice_T, dataset.slice_names, slice_names),
                source_T=_looked_up(packed.source_T, dataset.source_names, source_names),
                unit_T=_numbered_on(packed.unit_T, units),
            )
        )
        documents += dataset.n_documents
        units += int(dataset.unit_D.max(initial=-1)) + 1
        segments += int(packed.segment_T.max(initial=-1)) + 1
    return _rows(renamed, lengths.pop()), _documents(datasets, slice_names, source_names)


def _seen(packed: Packed, dataset: TokenDataset) -> tuple[Packed, TokenDataset]:
    """Rows and the documents that they are of, numbered from 0, and their units too."""
    document_D = np.unique(packed.document_T[packed.document_T >= 0])
    unit_U, unit_D = np.unique(dataset.unit_D[document_D], return_inverse=True)
    begin_D, end_D = dataset.offset_D[document_D], dataset.offset_D[document_D + 1]
    at_N = np.concatenate(
        [np.empty(0, np.int64), *(np.arange(begin, end) for begin, end in zip(begin_D, end_D, strict=True))]
    )
    own = replace(
        dataset,
        id_N=dataset.id_N[at_N],
        byte_N=dataset.byte_N[at_N],
        weight_N=dataset.weight_N[at_N],
        offset_D=np.concatenate([np.zeros(1, np.int64), np.cumsum(end_D - begin_D)]),
        document_ids=tuple(dataset.document_ids[d] for d in document_D),
        groups=tuple(dataset.groups[d] for d in document_D),
        slice_D=dataset.slice_D[document_D],
        source_D=dataset.source_D[document_D],
        unit_D=unit_D.astype(np.int32),
        whole_D=dataset.whole_D[document_D],
        columns={name: values_N[at_N] for name, values_N in dataset.columns.items()},
        labels={name: values_D[document_D] for name, values_D in dataset.labels.items()},
    )
    rows = packed._replace(
        document_T=_found(packed.document_T, document_D), unit_T=_found(packed.unit_T, unit_U)
    )
    return rows, own


def _found(number_T: Int64Array, among: IntArray) -> Int64Array:
    """The place of each number among sorted ones; -1 stays."""
    return np.where(number_T < 0, -1, np.searchsorted(among, number_T)).astype(np.int64)


def _numbered_on(number_T: Int64Array, before: int) -> Int64Array:
    return np.where(number_T < 0, -1, number_T + before)


def _looked_up(number_T: IntArray, own: Sequence[str], names: Sequence[str]) -> Int64Array:
    """Indices into `own` as indices into `names`; -1 stays."""
    place = {name: number for number, name in enumerate(names)}
    return np.array([*(place[name] for name in own), -1], np.int64)[number_T]


def _rows(parts: Sequence[Packed], length: int) -> Packed:
    names = sorted({name for part in parts for name in part.columns})
    columns = {
        name: np.concatenate([part.columns.get(name, _nothing(len(part.token_T))) for part in parts])
        for name in names
    }
    fields = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in Packed._fields
        if name not in ("length", "columns")
    }
    return Packed(**fields, length=length, columns=columns)


def _documents(
    parts: Sequence[TokenDataset], slice_names: tuple[str, ...], source_names: tuple[str, ...]
) -> TokenDataset:
    tokens_before = np.cumsum([0, *(part.n_tokens for part in parts)])
    units_before = np.cumsum([0, *(int(part.unit_D.max(initial=-1)) + 1 for part in parts)])

    def joined(name: str) -> npt.NDArray[Any]:
        return np.concatenate([getattr(part, name) for part in parts])

    def numbers(field: str, sizes: Sequence[int]) -> dict[str, FloatArray]:
        names = sorted({name for part in parts for name in getattr(part, field)})
        return {
            name: np.concatenate(
                [getattr(p, field).get(name, _nothing(size)) for p, size in zip(parts, sizes, strict=True)]
            )
            for name in names
        }

    def names_of(field: str, own: str, names: Sequence[str]) -> IntArray:
        looked_up = [_looked_up(getattr(part, field), getattr(part, own), names) for part in parts]
        return np.concatenate(looked_up, dtype=np.int32)

    return TokenDataset(
        id_N=joined("id_N"),
        byte_N=joined("byte_N"),
        weight_N=joined("weight_N"),
        offset_D=np.concatenate(
            [np.zeros(1, np.int64)]
            + [part.offset_D[1:] + before for part, before in zip(parts, tokens_before, strict=False)]
        ),
        document_ids=tuple(name for part in parts for name in part.document_ids),
        groups=tuple(name for part in parts for name in part.groups),
        slice_D=names_of("slice_D", "slice_names", slice_names),
        source_D=names_of("source_D", "source_names", source_names),
        slice_names=slice_names,
        source_names=source_names,
        unit_D=np.concatenate(
            [p.unit_D + before for p, before in zip(parts, units_before, strict=False)], dtype=np.int32
        ),
        whole_D=joined("whole_D"),
        columns=numbers("columns", [part.n_tokens for part in parts]),
        labels=numbers("labels", [part.n_documents for part in parts]),
    )


def _nothing(size: int) -> Float32Array:
    return np.full(size, np.nan, np.float32)
