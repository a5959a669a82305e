"""The work on all signatures at once: candidates band by band, exact comparison, clusters.

    Index(options, spill).add(signatures) ... .find() --> NearDuplicates

`near_duplicates` says what is done and why; this is how. Documents are numbered in the order of survival as
soon as all are known: "document" below is such a number, and "row" its place in the order of arrival. A pair
is one number too, left * 2^32 + right with left < right.

Shape legend: D documents, B bands, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations, product
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from gyrocompass.data.curate.clusters import first_of_equal, roots
from gyrocompass.data.curate.columns import column, numbers
from gyrocompass.data.curate.jaccard import compare
from gyrocompass.data.curate.spill import Spill
from gyrocompass.data.curate.survivors import STANDING, survival_order
from gyrocompass.data.curate.words import BoolArray, Int64Array, UInt64Array

Float64Array = npt.NDArray[np.float64]

_HALF = np.uint64(32)
_ROWS_AT_ONCE = 2**20
_LEAST_PART_BYTES = 2**24


class NearDuplicates(NamedTuple):
    """What was found. Documents are numbers: places in `ids`."""

    ids: pa.Array
    """In the order of survival."""
    left_P: Int64Array
    """Pairs at or above the threshold; the left one is preferred to the right one. Documents with equal words
    are paired with the first of them alone, and pairs of others are of such first ones."""
    right_P: Int64Array
    jaccard_P: Float64Array
    first_D: Int64Array
    """The first document with the same words; itself where it is that."""
    survivor_D: Int64Array
    """Itself where there is no duplicate."""
    partner_D: Int64Array
    """-1 where the document survives."""
    partner_jaccard_D: Float64Array
    survivor_jaccard_D: Float64Array
    n_compared: int
    """Candidate pairs whose shingles were compared."""

    def pairs(self) -> Iterator[tuple[str, str, float]]:
        """Each pair by its ids: the preferred one, the other, their Jaccard similarity."""
        ids = self.ids.to_pylist()
        for left, right, jaccard in zip(self.left_P, self.right_P, self.jaccard_P, strict=True):
            yield ids[left], ids[right], float(jaccard)

    def every_pair(self) -> Iterator[tuple[str, str]]:
        """The pairs, and those that follow since documents with the same words have the same similarities.

        Their number grows with the square of the copies of a document.
        """
        ids = self.ids.to_pylist()
        same: dict[int, list[str]] = {}
        for document, first in enumerate(self.first_D.tolist()):
            same.setdefault(first, []).append(ids[document])
        for left, right in zip(
            self.first_D[self.left_P].tolist(), self.first_D[self.right_P].tolist(), strict=True
        ):
            if left != right:
                yield from product(same[left], same[right])
        for copies in same.values():
            yield from combinations(copies, 2)

    def clusters(self) -> dict[str, list[str]]:
        """For each survivor with duplicates, these, in the order of survival."""
        ids = self.ids.to_pylist()
        found: dict[str, list[str]] = {}
        for document in np.flatnonzero(self.partner_D >= 0):
            found.setdefault(ids[self.survivor_D[document]], []).append(ids[document])
        return found


class Index:
    """Signatures as they come, then what they say together.

    Args:
        bands: keys of each document.
        threshold: the least Jaccard similarity of duplicates.
        largest_bucket: documents of one key that are all compared with each other.
        spill: keeps band keys and shingles.
    """

    def __init__(self, bands: int, threshold: float, largest_bucket: int, spill: Spill) -> None:
        self._threshold, self._largest_bucket = threshold, largest_bucket
        self._keys = [spill.array(np.uint64) for _ in range(bands)]
        self._shingles = spill.array(np.uint64)
        self._part_bytes = max(spill.limit_bytes, _LEAST_PART_BYTES)
        self._known: list[pa.RecordBatch] = []
        self._counts: list[Int64Array] = [np.empty(0, np.int64)]

    def add(self, signatures: pa.RecordBatch) -> None:
        """Keep a batch of signatures, as `NearDuplicateStep.signatures` makes them."""
        self._known.append(signatures.select(["id", *STANDING.names, "sequence"]))
        key_DB = numbers(signatures["bands"].flatten()).reshape(-1, len(self._keys))
        for keys, key_D in zip(self._keys, key_DB.T, strict=True):
            keys.append(key_D)
        self._counts.append(np.diff(numbers(signatures["shingles"].offsets)))
        self._shingles.append(numbers(signatures["shingles"].flatten()))

    def find(self) -> NearDuplicates:
        """Number the documents, compare candidates, join clusters."""
        known = pa.concat_batches(self._known)
        count_R = np.concatenate(self._counts)
        self._known.clear()
        self._row_D = survival_order(known["id"], known)
        self._begin_R1 = np.concatenate([[0], np.cumsum(count_R)])
        self._size_D = count_R[self._row_D]
        first_D = first_of_equal(numbers(known["sequence"])[self._row_D], self._size_D)
        first_D = np.where(self._size_D > 0, first_D, np.arange(len(first_D)))
        settled = self._settle((self._size_D > 0) & (first_D == np.arange(len(first_D))))
        near = settled.jaccard_P >= self._threshold
        copy_C = np.flatnonzero(first_D != np.arange(len(first_D)))
        left_P, right_P = _documents_of(settled.pair_P[near])
        return self._clusters(
            known["id"].take(column(self._row_D)),
            np.concatenate([left_P, first_D[copy_C]]),
            np.concatenate([right_P, copy_C]),
            np.concatenate([settled.jaccard_P[near], np.ones(len(copy_C))]),
            first_D,
            len(settled.pair_P),
        )

    def _clusters(
        self,
        ids: pa.Array,
        left_P: Int64Array,
        right_P: Int64Array,
        jaccard_P: Float64Array,
        first_D: Int64Array,
        n_compared: int,
    ) -> NearDuplicates:
        """Survivors, partners, and how near they are."""
        survivor_D = roots(np.arange(len(ids)), left_P, right_P)
        partner_D = np.full(len(ids), -1)
        near_D, survivor_near_D = np.zeros(len(ids)), np.zeros(len(ids))
        document, other = np.concatenate([left_P, right_P]), np.concatenate([right_P, left_P])
        jaccard = np.tile(jaccard_P, 2)
        # The nearest of those that are preferred to it; of the others where there is none.
        best = np.lexsort((other, -jaccard, other > document, document))
        best = best[np.diff(document[best], prepend=-1) > 0]
        best = best[survivor_D[document[best]] != document[best]]
        partner_D[document[best]], near_D[document[best]] = other[best], jaccard[best]
        direct = partner_D == survivor_D
        survivor_near_D[direct] = near_D[direct]
        far = np.flatnonzero((partner_D >= 0) & ~direct)
        survivor_near_D[far] = compare(survivor_D[far], far, self._size_D, self._gather).jaccard_P
        return NearDuplicates(
            ids,
            left_P,
            right_P,
            jaccard_P,
            first_D,
            survivor_D,
            partner_D,
            near_D,
            survivor_near_D,
            n_compared,
        )

    def _settle(self, stands_D: BoolArray) -> _Settled:
        """Compare all candidates among the documents that stand for themselves."""
        settled = _Settled(self._threshold, self._compare)
        for band in range(len(self._keys)):
            for document_C, bucket_C in self._buckets(band, stands_D):
                size_C = np.bincount(bucket_C)[bucket_C]
                small = size_C <= self._largest_bucket
                settled.near(np.unique(_pairs_within(document_C[small], bucket_C[small])))
                self._compare_with_first(document_C[~small], bucket_C[~small], settled)
                settled.merge()
        return settled

    def _buckets(self, band: int, stands_D: BoolArray) -> Iterator[tuple[Int64Array, Int64Array]]:
        """Documents that share a key with another, sorted by bucket and then by document; part by part."""
        keys = self._keys[band]
        parts = -(-4 * 8 * keys.size // self._part_bytes)
        document_R = np.empty(keys.size, np.int64)
        document_R[self._row_D] = np.arange(keys.size)
        for part in range(parts):
            chosen_keys, chosen = [], []
            for start in range(0, keys.size, _ROWS_AT_ONCE):
                key_R = keys.read(start, min(start + _ROWS_AT_ONCE, keys.size))
                documents = document_R[start : start + _ROWS_AT_ONCE]
                wanted = stands_D[documents] & (key_R % np.uint64(parts) == part)
                chosen_keys.append(key_R[wanted])
                chosen.append(documents[wanted])
            yield _shared(np.concatenate(chosen_keys), np.concatenate(chosen))

    def _compare_with_first(self, document_C: Int64Array, bucket_C: Int64Array, settled: _Settled) -> None:
        """Large buckets: everybody with the first, who is not near it with the first of the rest, and so
        on."""
        for _ in range(self._largest_bucket):
            if not len(document_C):
                return
            is_first = np.diff(bucket_C, prepend=-1) > 0
            first_C = document_C[is_first][np.cumsum(is_first) - 1]
            rest = ~is_first
            document_C, bucket_C, first_C = document_C[rest], bucket_C[rest], first_C[rest]
            far = ~settled.near(_pair(first_C, document_C))
            document_C, bucket_C = document_C[far], bucket_C[far]

    def _compare(self, pair_P: UInt64Array) -> Float64Array:
        return compare(*_documents_of(pair_P), self._size_D, self._gather).jaccard_P

    def _gather(self, documents: Int64Array) -> tuple[UInt64Array, Int64Array]:
        rows = self._row_D[documents]
        spans = zip(self._begin_R1[rows].tolist(), self._begin_R1[rows + 1].tolist(), strict=True)
        parts = [self._shingles.read(start, stop) for start, stop in spans]
        ends = np.cumsum([0, *map(len, parts)])
        return np.concatenate(parts) if parts else np.empty(0, np.uint64), ends


class _Settled:
    """Pairs that were compared, each once, whatever bands propose them."""

    def __init__(self, threshold: float, compare_pairs: Callable[[UInt64Array], Float64Array]) -> None:
        self._threshold, self._compare = threshold, compare_pairs
        self.pair_P: UInt64Array = np.empty(0, np.uint64)
        """Ascending."""
        self.jaccard_P: Float64Array = np.empty(0)
        self._fresh: list[tuple[UInt64Array, Float64Array]] = []

    def near(self, pair_P: UInt64Array) -> BoolArray:
        """Whether each pair is at or above the threshold.

        Args:
            pair_P: all different, and different from those given since the last `merge`.
        """
        place_P = np.searchsorted(self.pair_P, pair_P)
        known = np.zeros(len(pair_P), np.bool_)
        inside = place_P < len(self.pair_P)
        known[inside] = self.pair_P[place_P[inside]] == pair_P[inside]
        jaccard_P = np.empty(len(pair_P))
        jaccard_P[known] = self.jaccard_P[place_P[known]]
        jaccard_P[~known] = self._compare(pair_P[~known])
        self._fresh.append((pair_P[~known], jaccard_P[~known]))
        return jaccard_P >= self._threshold

    def merge(self) -> None:
        """Remember what was compared since the last time."""
        pairs, jaccards = zip((self.pair_P, self.jaccard_P), *self._fresh, strict=True)
        self._fresh.clear()
        pair_P = np.concatenate(pairs)
        order = np.argsort(pair_P, kind="stable")
        self.pair_P, self.jaccard_P = pair_P[order], np.concatenate(jaccards)[order]


def _shared(key_C: UInt64Array, document_C: Int64Array) -> tuple[Int64Array, Int64Array]:
    """Those whose key is not theirs alone, and the number of their bucket; see `Index._buckets`."""
    order = np.argsort(key_C)
    same = np.diff(key_C[order]) == 0
    several = np.zeros(len(key_C), np.bool_)
    several[1:] |= same
    several[:-1] |= same
    order = order[several]
    key_C, document_C = key_C[order], document_C[order]
    bucket_C = np.cumsum(np.diff(key_C, prepend=key_C[:1]) != 0)
    order = np.lexsort((document_C, bucket_C))
    return document_C[order], bucket_C[order]


def _pairs_within(document_C: Int64Array, bucket_C: Int64Array) -> UInt64Array:
    """All pairs of documents of one bucket."""
    found = [np.empty(0, np.uint64)]
    left = np.arange(len(document_C))
    for distance in range(1, len(document_C)):
        left = left[left + distance < len(document_C)]
        left = left[bucket_C[left] == bucket_C[left + distance]]
        if not len(left):
            break
        found.append(_pair(document_C[left], document_C[left + distance]))
    return np.concatenate(found)


def _pair(left_P: Int64Array, right_P: Int64Array) -> UInt64Array:
    return left_P.astype(np.uint64) << _HALF | right_P.astype(np.uint64)


def _documents_of(pair_P: UInt64Array) -> tuple[Int64Array, Int64Array]:
    return (pair_P >> _HALF).astype(np.int64), (pair_P & np.uint64(2**32 - 1)).astype(np.int64)
