"""Containment: a document most of which stands in another one, or half in one and half in a second.

    documents  --signatures--> shingles, standing
    signatures --resolve-->    partner and share, second partner and the share of both, redundant
    containment(texts, ids) --> RecordBatch              (the same as a plain function)

Of a document's shingles S, the share in another document is |S & A| / |S|; the share in two is |S & (A | B)|
/ |S|. An excerpt has a share near 1 in one document and a Jaccard similarity that may be small; a splice,
half of one document and half of another, a share near 1/2 in each and near 1 in both.

Candidates come from an index of the shingles whose hash is divisible by `sample` (Broder 1997): whatever two
documents share, about 1 in `sample` of it is there. Pairs are counted that have such shingles in common,
shingles in more than `most_common` documents left out. Of each document the `most_partners` largest counts
are compared exactly, and the two partners are chosen by exact shares: the best one, then the one that adds
most.

A share says nothing of which one to drop, and two copies are each within the other. `redundant` is a choice
that leaves nothing uncovered: documents are taken from the largest share down (of equal ones, from the least
preferred up), and one is redundant if it is the partner of none that is, and its share in partners that are
not redundant is at or above the threshold; they are then the ones that are named. Partners that are not
covered themselves come first.

Memory: 16 bytes for each sampled shingle; all shingles beyond `memory_mb` in a temporary file.

Shape legend: D documents, S sampled shingles, P pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
from pydantic import Field

from gyrocompass.data.curate.columns import column, numbers
from gyrocompass.data.curate.given import batches_of
from gyrocompass.data.curate.minhash import shingles
from gyrocompass.data.curate.spill import Spill, SpillArray
from gyrocompass.data.curate.step import CorpusAccess, GlobalStep, register
from gyrocompass.data.curate.survivors import STANDING, SurvivorRule, survival_order
from gyrocompass.data.curate.words import BoolArray, Int64Array, UInt64Array, blocks, text_array, word_hashes

_HALF = np.uint64(32)
_LEAST_NEW = 0.01
"""A second partner adds at least this share."""


class Cover(NamedTuple):
    """What the other documents hold of one."""

    share: float
    """The share in the partner."""
    partner: int
    """-1: none."""
    share_of_two: float
    second: int
    """-1: none that adds anything."""

    @property
    def partners(self) -> list[int]:
        """None, one or two."""
        return [one for one in (self.partner, self.second) if one >= 0]


_NOTHING = Cover(0.0, -1, 0.0, -1)


@register
class ContainmentStep(GlobalStep):
    """Says how much of each document stands in one other document, and in two.

    Columns: `partner` and `containment`, the share of the document's shingles in it; `second` and `covered`,
    the share in both; `redundant`, see above. A document of whose shingles less than `least` are found has 0
    and nulls.

    Args:
        shingle_words: words in a shingle.
        threshold: the least share, in its partners, of a document that is redundant.
        least: the least share in one partner that is reported.
        sample: one shingle of so many is in the index.
        most_common: documents that a shingle may be in.
        most_partners: candidates of a document that are compared.
        memory_mb: MiB of shingles in memory; the rest is in a temporary file.
        survivors: which one of duplicates stays.
    """

    name: ClassVar[str] = "containment"
    shingle_words: int = Field(5, ge=1, le=64)
    threshold: float = Field(0.9, gt=0, le=1)
    least: float = Field(0.2, gt=0, le=1)
    sample: int = Field(4, ge=1)
    most_common: int = Field(32, ge=2)
    most_partners: int = Field(8, ge=2)
    memory_mb: int = Field(32, ge=0)
    survivors: SurvivorRule = SurvivorRule()

    def reads(self) -> tuple[str, ...]:
        """The column of quality, where the rule for survivors names one."""
        return () if self.survivors.quality is None else (self.survivors.quality,)

    def signatures(self, documents: pa.RecordBatch) -> pa.RecordBatch:
        """The shingles of each document, and how it stands among duplicates."""
        given = [shingles(word_hashes(b), self.shingle_words) for b in blocks(text_array(documents["text"]))]
        count_D = np.concatenate([np.empty(0, np.int64), *(np.diff(part.begin_D1) for part in given)])
        hash_S = np.concatenate([np.empty(0, np.uint64), *(part.hash_S for part in given)])
        begin_D1 = np.concatenate([[0], np.cumsum(count_D)]).astype(np.int64)
        return pa.RecordBatch.from_arrays(
            [
                documents["id"],
                *self.survivors.standings(documents),
                pa.LargeListArray.from_arrays(column(begin_D1), column(hash_S)),
            ],
            ["id", *STANDING.names, "shingles"],
        )

    def resolve(self, signatures: Iterator[pa.RecordBatch], corpus: CorpusAccess) -> pa.RecordBatch:
        """One row for each document, in the order of survival."""
        return self.find(signatures)

    def find(self, signatures: Iterable[pa.RecordBatch]) -> pa.RecordBatch:
        """The columns of the step.

        Args:
            signatures: of all documents, in any order and any batches.
        """
        known, counts, sampled = [], [np.empty(0, np.int64)], [np.empty(0, np.uint64)]
        sampled_counts = [np.empty(0, np.int64)]
        with Spill(self.memory_mb * 2**20) as spill:
            kept = spill.array(np.uint64)
            for batch in signatures:
                known.append(batch.select(["id", *STANDING.names]))
                hash_S = numbers(batch["shingles"].flatten())
                count_D = np.diff(numbers(batch["shingles"].offsets))
                chosen_S = hash_S % np.uint64(self.sample) == 0
                running = np.concatenate([[0], np.cumsum(chosen_S)])
                ends = np.concatenate([[0], np.cumsum(count_D)])
                kept.append(hash_S)
                counts.append(count_D)
                sampled.append(hash_S[chosen_S])
                sampled_counts.append(np.diff(running[ends]))
            whole = pa.concat_batches(known)
            row_D = survival_order(whole["id"], whole)
            begin_R1 = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
            document_R = np.empty(len(row_D), np.int64)
            document_R[row_D] = np.arange(len(row_D))
            document_S = np.repeat(document_R, np.concatenate(sampled_counts))
            candidates = self._candidates(np.concatenate(sampled), document_S)
            covers, redundant_D = self._covers(candidates, _Sets(kept, begin_R1, row_D))
        return _annotations(whole["id"].take(column(row_D)), covers, redundant_D)

    def _candidates(self, hash_S: UInt64Array, document_S: Int64Array) -> Iterator[tuple[int, list[int]]]:
        """For each document that shares sampled shingles: with whom, most first."""
        pair_P, count_P = np.unique(_sharing(hash_S, document_S, self.most_common), return_counts=True)
        left, right = (pair_P >> _HALF).astype(np.int64), (pair_P & np.uint64(2**32 - 1)).astype(np.int64)
        one, other, count = np.append(left, right), np.append(right, left), np.append(count_P, count_P)
        order = np.lexsort((other, -count, one))
        one, other = one[order], other[order]
        begins = np.append(np.flatnonzero(np.diff(one, prepend=-1)), len(one))
        for begin, end in pairwise(begins.tolist()):
            yield int(one[begin]), other[begin : min(end, begin + self.most_partners)].tolist()

    def _covers(
        self, candidates: Iterable[tuple[int, list[int]]], sets: _Sets
    ) -> tuple[dict[int, Cover], BoolArray]:
        """Partners of each document that has any, and which documents are redundant."""
        covers, covered = {}, {}
        for document, others in candidates:
            cover = _best_two(document, others, sets)
            if cover.share >= self.least:
                covers[document] = cover
                if cover.share_of_two >= self.threshold:
                    covered[document] = others
        redundant_D = np.zeros(len(sets), np.bool_)
        needed: set[int] = set()
        for document in sorted(covered, key=lambda one: (-covers[one].share_of_two, -one)):
            if document in needed:
                continue
            others = [other for other in covered[document] if not redundant_D[other]]
            # Rather in documents that are not covered: splices with a common half are not each other's.
            for choice in ([other for other in others if other not in covered], others):
                cover = _best_two(document, choice, sets)
                if cover.share_of_two >= self.threshold:
                    covers[document] = cover
                    redundant_D[document] = True
                    needed.update(cover.partners)
                    break
        return covers, redundant_D


def containment(
    texts: Iterable[str], ids: Sequence[str] | None = None, step: ContainmentStep | None = None
) -> pa.RecordBatch:
    """Containment among texts: the columns of `ContainmentStep`, a row for each text.

    Args:
        texts: read once, and not kept.
        ids: one for each text, all different; None: their places, "00000000", "00000001", ...
        step: thresholds and limits.

    Raises:
        BadInput: ids are not all different, or not as many as texts.

    >>> one, two = ([f"{name}{n}" for n in range(60)] for name in ("left", "right"))
    >>> texts = map(" ".join, (one, two, one[:30] + two[30:]))
    >>> found = containment(texts, ["one", "two", "splice"])
    >>> found.filter(found["redundant"]).select(["id", "partner", "second"]).to_pylist()
    [{'id': 'splice', 'partner': 'one', 'second': 'two'}]
    """
    step = step or ContainmentStep()
    return step.find(step.signatures(batch) for batch in batches_of(texts, ids))


class _Sets:
    """The shingles of a document, sorted, each once; the last ones asked for are kept."""

    def __init__(self, kept: SpillArray, begin_R1: Int64Array, row_D: Int64Array) -> None:
        self._kept, self._begin_R1, self._row_D = kept, begin_R1, row_D
        self._recent: dict[int, UInt64Array] = {}

    def __len__(self) -> int:
        return len(self._row_D)

    def __getitem__(self, document: int) -> UInt64Array:
        if document not in self._recent:
            if len(self._recent) >= 4096:
                self._recent.clear()
            row = int(self._row_D[document])
            hashes = self._kept.read(int(self._begin_R1[row]), int(self._begin_R1[row + 1]))
            self._recent[document] = np.unique(hashes)
        return self._recent[document]


def _sharing(hash_S: UInt64Array, document_S: Int64Array, most_common: int) -> UInt64Array:
    """A pair for each sampled shingle that two documents share: left * 2^32 + right."""
    order = np.lexsort((document_S, hash_S))
    hash_S, document_S = hash_S[order], document_S[order]
    fresh = (np.diff(hash_S) != 0) | (np.diff(document_S) != 0)
    once = np.concatenate([[True], fresh])[: len(hash_S)]
    hash_S, document_S = hash_S[once], document_S[once]
    group_S = np.cumsum(np.concatenate([[False], np.diff(hash_S) != 0])[: len(hash_S)])
    common = np.bincount(group_S)[group_S] <= most_common if len(group_S) else np.empty(0, np.bool_)
    group_S, document_S = group_S[common], document_S[common]
    found, left = [np.empty(0, np.uint64)], np.arange(len(group_S))
    for distance in range(1, most_common):
        left = left[left + distance < len(group_S)]
        left = left[group_S[left] == group_S[left + distance]]
        found.append(
            document_S[left].astype(np.uint64) << _HALF | document_S[left + distance].astype(np.uint64)
        )
    return np.concatenate(found)


def _best_two(document: int, others: Sequence[int], sets: _Sets) -> Cover:
    """The partner with the largest share, and the one that adds most to it."""
    if not others:
        return _NOTHING
    found = [(other, np.isin(sets[document], sets[other], assume_unique=True)) for other in others]
    partner, inside = min(found, key=lambda one: (-int(one[1].sum()), one[0]))
    joined = ((other, inside | theirs) for other, theirs in found)
    second, both = min(joined, key=lambda one: (-int(one[1].sum()), one[0]))
    share, share_of_two = float(inside.mean()), float(both.mean())
    if share_of_two < share + _LEAST_NEW:
        second, share_of_two = -1, share
    return Cover(share, partner, share_of_two, second)


def _annotations(ids: pa.Array, covers: dict[int, Cover], redundant_D: BoolArray) -> pa.RecordBatch:
    """The columns of `ContainmentStep`."""
    rows = [covers.get(document, _NOTHING) for document in range(len(ids))]

    def named(documents: list[int]) -> pa.Array:
        return ids.take(pa.array([None if one < 0 else one for one in documents], pa.int64()))

    return pa.RecordBatch.from_arrays(
        [
            ids,
            named([row.partner for row in rows]),
            pa.array([row.share for row in rows], pa.float32()),
            named([row.second for row in rows]),
            pa.array([row.share_of_two for row in rows], pa.float32()),
            column(redundant_D),
        ],
        ["id", "partner", "containment", "second", "covered", "redundant"],
    )
