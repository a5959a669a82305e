"""Repeated passages: every stretch of text, at least so many characters long, that stands somewhere before.

    documents --resolve--> spans of characters that are copies, and their share of the text
    repeated_passages(texts, ids) --> RecordBatch        (the same as a plain function)

Documents are put one after another in the order of survival (`survivors`), as UTF-8, byte 0xFF between them,
and all suffixes of that are sorted (`suffixes`). Suffixes whose first `minimum` characters are equal are
neighbours then. Of each such group the one that comes first is the original; where any other begins,
`minimum` characters are a copy. Copies that overlap or touch are one span, so a span is as long as what is
repeated, to the character. A copy that overlaps its own original, as in a row of dashes, counts from where it
no longer does.

A suffix array takes many times the memory of its text, so the corpus is taken in chunks of `chunk_mb`. A
corpus of one chunk is searched completely. Of a larger one, each chunk is searched together with those
documents of earlier chunks that share a fingerprint with it: any passage of `minimum` characters has one
(`fingerprints`), so a passage is found if it is in the same chunk, or in one of the `most_sources` first
documents that have its fingerprint, as long as these take no more room than the chunk itself (the most
preferred are taken first).

Shape legend: N bytes, C characters, D documents.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from gyrocompass.data.curate.columns import column, numbers
from gyrocompass.data.curate.fingerprints import fingerprints
from gyrocompass.data.curate.given import batches_of
from gyrocompass.data.curate.step import SPANS, CorpusAccess, GlobalStep, MemoryCorpus, register
from gyrocompass.data.curate.suffixes import Copies, find_copies
from gyrocompass.data.curate.survivors import STANDING, SurvivorRule, survival_order
from gyrocompass.data.curate.words import Int64Array, UInt64Array, byte_view, text_array

KIND = "repeated"


class _Found(NamedTuple):
    """The copies in one document, in characters of its text."""

    start: list[int]
    end: list[int]
    partner: str | None


@register
class RepeatedPassageStep(GlobalStep):
    """Marks passages that stand in a document that is preferred to this one, or earlier in this one.

    Columns: `spans`, of the kind "repeated"; `share`, the share of the text's characters in them; `partner`,
    the document where the longest begins for the first time, null where there are no spans.

    Args:
        minimum: characters of the shortest passage.
        chunk_mb: MiB of text that are searched at once; memory is about 25 times as much.
        most_sources: documents of earlier chunks that are looked at for one fingerprint.
        survivors: in which document a passage stays.
    """

    name: ClassVar[str] = "repeated_passages"
    minimum: int = Field(200, ge=8)
    chunk_mb: float = Field(32, gt=0, le=1024)
    most_sources: int = Field(4, ge=1)
    survivors: SurvivorRule = SurvivorRule()

    def reads(self) -> tuple[str, ...]:
        """The column of quality, where the rule for survivors names one."""
        return () if self.survivors.quality is None else (self.survivors.quality,)

    def signatures(self, documents: pa.RecordBatch) -> pa.RecordBatch:
        """The length of each document, and how it stands."""
        _, begin_D1 = byte_view(text_array(documents["text"]))
        columns = [documents["id"], *self.survivors.standings(documents), column(np.diff(begin_D1))]
        return pa.RecordBatch.from_arrays(columns, ["id", *STANDING.names, "n_bytes"])

    def resolve(self, signatures: Iterator[pa.RecordBatch], corpus: CorpusAccess) -> pa.RecordBatch:
        """One row for each document, in the order of survival.

        Raises:
            MissingDependency: `pydivsufsort` is not installed.
        """
        known = pa.concat_batches(list(signatures))
        known = known.take(column(survival_order(known["id"], known)))
        ids, length_D = known["id"], numbers(known["n_bytes"])
        chunks = list(_chunks(length_D, int(self.chunk_mb * 2**20)))
        sources = _Sources(self, corpus, ids, length_D) if len(chunks) > 1 else None
        found: list[_Found] = []
        shares: list[float] = []
        for first, last in chunks:
            texts = corpus.take(ids[first:last].to_pylist(), ["text"])["text"]
            before = np.empty(0, np.int64)
            if sources is not None:
                before = sources.of(texts, first)
                earlier = corpus.take(ids.take(column(before)).to_pylist(), ["text"])["text"]
                texts = pa.concat_arrays([text_array(earlier), text_array(texts)])
            names = ids.take(column(np.concatenate([before, np.arange(first, last)])))
            found += _by_document(find_copies(text_array(texts), self.minimum), names)[len(before) :]
            shares += _shares(found[first:], texts.slice(len(before)))
        return _annotations(ids, found, shares)


def repeated_passages(
    texts: Iterable[str], ids: Sequence[str] | None = None, step: RepeatedPassageStep | None = None
) -> pa.RecordBatch:
    """Repeated passages among texts: the columns of `RepeatedPassageStep`, a row for each text.

    Args:
        texts: kept in memory.
        ids: one for each text, all different; None: their places, "00000000", "00000001", ...
        step: lengths and limits.

    Raises:
        BadInput: ids are not all different, or not as many as texts.
        MissingDependency: `pydivsufsort` is not installed.
    """
    step = step or RepeatedPassageStep()
    batches = list(batches_of(texts, ids))
    return step.resolve(map(step.signatures, batches), MemoryCorpus(batches))


class _Sources:
    """Which earlier documents share a fingerprint with a chunk.

    Memory: 16 bytes for each fingerprint, of which a text has about 4 for each `minimum` bytes.
    """

    def __init__(
        self, step: RepeatedPassageStep, corpus: CorpusAccess, ids: pa.Array, length_D: Int64Array
    ) -> None:
        self._step, self._length_D = step, length_D
        place = {document_id: place for place, document_id in enumerate(ids.to_pylist())}
        hashes, documents = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
        for batch in corpus.batches(["id", "text"]):
            for document_id, marks in zip(batch["id"].to_pylist(), self._marks(batch["text"]), strict=True):
                hashes.append(marks)
                documents.append(np.full(len(marks), place[document_id]))
        hash_F, document_F = np.concatenate(hashes), np.concatenate(documents)
        order = np.lexsort((document_F, hash_F))
        self._hash_F, self._document_F = hash_F[order], document_F[order]

    def of(self, texts: pa.Array, first: int) -> Int64Array:
        """Documents before `first` that share a fingerprint with any of the texts, ascending."""
        wanted = np.unique(np.concatenate([np.empty(0, np.uint64), *self._marks(texts)]))
        place = np.searchsorted(self._hash_F, wanted)
        found = []
        for further in range(self._step.most_sources):
            inside = place + further < len(self._hash_F)
            inside[inside] = self._hash_F[place[inside] + further] == wanted[inside]
            found.append(self._document_F[place[inside] + further])
        before = np.unique(np.concatenate(found))
        before = before[before < first]
        return before[np.cumsum(self._length_D[before] + 1) <= self._step.chunk_mb * 2**20]

    def _marks(self, texts: pa.Array) -> Iterator[UInt64Array]:
        byte_N, begin_D1 = byte_view(text_array(texts))
        for begin, end in pairwise(begin_D1):
            yield fingerprints(byte_N[begin:end], self._step.minimum)


def _chunks(length_D: Int64Array, chunk_bytes: int) -> Iterator[tuple[int, int]]:
    """First and last plus one of the documents of each chunk: as many as fit, at least one."""
    end_D = np.cumsum(length_D + 1)
    first = 0
    while first < len(length_D):
        begin = int(end_D[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(end_D, begin + chunk_bytes, side="right")))
        yield first, last
        first = last


def _by_document(copies: Copies, names: pa.Array) -> list[_Found]:
    """Copies by the document they are in."""
    found = [_Found([], [], None) for _ in range(len(names))]
    ids = names.to_pylist()
    for document, start, end, source in zip(*(part.tolist() for part in copies), strict=True):
        one = found[document]
        longest = max((b - a for a, b in zip(one.start, one.end, strict=True)), default=0)
        one.start.append(start)
        one.end.append(end)
        if end - start > longest:
            found[document] = one._replace(partner=ids[source])
    return found


def _shares(found: Sequence[_Found], texts: pa.Array) -> list[float]:
    characters = pc.utf8_length(texts).to_pylist()
    copied = [sum(one.end) - sum(one.start) for one in found]
    return [part / max(whole, 1) for part, whole in zip(copied, characters, strict=True)]


def _annotations(ids: pa.Array, found: Sequence[_Found], shares: Sequence[float]) -> pa.RecordBatch:
    """The columns of `RepeatedPassageStep`."""
    spans = [
        [{"start": a, "end": b, "kind": KIND, "score": 1.0} for a, b in zip(one.start, one.end, strict=True)]
        for one in found
    ]
    return pa.RecordBatch.from_arrays(
        [
            ids,
            pa.array(spans, SPANS),
            pa.array(shares, pa.float32()),
            pa.array([one.partner for one in found], pa.string()),
        ],
        ["id", "spans", "share", "partner"],
    )
