"""Near-duplicates: MinHash proposes pairs, their exact Jaccard similarity settles them.

    documents  --signatures--> band keys, shingles, standing        (map)
    signatures --resolve-->    clusters, partners, similarities     (reduce)
    near_duplicates(texts, ids) --> NearDuplicates                  (the same as a plain function)

1. Documents are numbered in the order of survival (`survivors`): document 0 is preferred to all others. From
   here on nothing depends on the order in which they came.
2. Documents with the same sequence of words are one: their similarity is 1, and the first stands for them.
3. In each band, documents with one key are candidates, all pairs of them. In a bucket of more than
   `largest_bucket`, all are compared with the first instead; who is not near it is compared with the first of
   the rest, and so on, at most `largest_bucket` times.
4. The shingles of each candidate pair are compared exactly; pairs at or above the threshold join clusters. Of
a
   cluster the first document survives.

A document that does not survive names its partner, the nearest of the documents that it was found near to and
that are preferred to it (of any, where none is preferred; of equally near ones the first). The survivor
itself may be further away, where a chain of pairs leads to it; `survivor_similarity` says how near it is, so
that a rule can ask for more than the chain.

Memory: about 100 bytes for each document, twice the candidate pairs, and what `memory_mb` allows to band keys
(8 bytes for each band) and shingles (8 bytes for each word), which beyond it are in files. A band whose keys
alone pass the limit is sorted part by part.

Shape legend: D documents, B bands, P pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from gyrocompass.data.curate.clusters import cluster_names
from gyrocompass.data.curate.columns import column
from gyrocompass.data.curate.given import batches_of
from gyrocompass.data.curate.minhash import Permutations, band_keys, sequence_hashes, shingles
from gyrocompass.data.curate.near_index import Index, NearDuplicates
from gyrocompass.data.curate.spill import Spill
from gyrocompass.data.curate.step import CorpusAccess, GlobalStep, register
from gyrocompass.data.curate.survivors import STANDING, SurvivorRule
from gyrocompass.data.curate.words import Int64Array, UInt64Array, blocks, text_array, word_hashes


@register
class NearDuplicateStep(GlobalStep):
    """Marks documents that are nearly another one.

    Columns: `cluster`, the smallest id of those that belong together (null: alone), `duplicate` (whether
    another of them survives), `partner` and `similarity`, `survivor` and `survivor_similarity`; similarities
    are Jaccard's. All but the first two are null for documents that survive.

    Args:
        shingle_words: words in a shingle.
        bands: MinHash bands.
        rows: permutations in a band.
        threshold: the least Jaccard similarity of duplicates.
        seed: of the permutations.
        largest_bucket: documents of one key that are all compared with each other.
        memory_mb: MiB of band keys and shingles in memory; the rest is in temporary files.
        survivors: which one of duplicates stays.
    """

    name: ClassVar[str] = "near_duplicates"
    shingle_words: int = Field(5, ge=1, le=64)
    bands: int = Field(25, ge=1, le=1024)
    rows: int = Field(5, ge=1, le=64)
    threshold: float = Field(0.7, gt=0, le=1)
    seed: int = 0
    largest_bucket: int = Field(64, ge=2)
    memory_mb: int = Field(32, ge=0)
    survivors: SurvivorRule = SurvivorRule()

    def reads(self) -> tuple[str, ...]:
        """The column of quality, where the rule for survivors names one."""
        return () if self.survivors.quality is None else (self.survivors.quality,)

    def signatures(self, documents: pa.RecordBatch) -> pa.RecordBatch:
        """Band keys and shingles of each document, and how it stands among duplicates."""
        permutations = Permutations.draw(self.bands, self.rows, self.seed)
        parts = [self._block(block, permutations) for block in blocks(text_array(documents["text"]))]
        if not parts:
            parts = [self._block(text_array([]), permutations)]
        sequence_D, key_DB, counts_D, hash_S = (np.concatenate(part) for part in zip(*parts, strict=True))
        begin_D1 = np.concatenate([[0], np.cumsum(counts_D)])
        return pa.RecordBatch.from_arrays(
            [
                documents["id"],
                *self.survivors.standings(documents),
                column(sequence_D),
                pa.FixedSizeListArray.from_arrays(column(key_DB.reshape(-1)), self.bands),
                pa.LargeListArray.from_arrays(column(begin_D1), column(hash_S)),
            ],
            ["id", *STANDING.names, "sequence", "bands", "shingles"],
        )

    def resolve(self, signatures: Iterator[pa.RecordBatch], corpus: CorpusAccess) -> pa.RecordBatch:
        """One row for each document, in the order of survival."""
        return _annotations(self.find(signatures))

    def find(self, signatures: Iterable[pa.RecordBatch]) -> NearDuplicates:
        """Clusters and the pairs that made them.

        Args:
            signatures: of all documents, in any order and any batches.
        """
        with Spill(self.memory_mb * 2**20) as spill:
            index = Index(self.bands, self.threshold, self.largest_bucket, spill)
            for batch in signatures:
                index.add(batch)
            return index.find()

    def _block(
        self, texts: pa.Array, permutations: Permutations
    ) -> tuple[UInt64Array, UInt64Array, Int64Array, UInt64Array]:
        words = word_hashes(texts)
        given = shingles(words, self.shingle_words)
        counts_D = np.diff(given.begin_D1)
        return sequence_hashes(words), band_keys(given, permutations), counts_D, given.hash_S


def near_duplicates(
    texts: Iterable[str], ids: Sequence[str] | None = None, step: NearDuplicateStep | None = None
) -> NearDuplicates:
    """Near-duplicates among texts.

    Args:
        texts: read once, and not kept.
        ids: one for each text, all different; None: their places, "00000000", "00000001", ...
        step: thresholds and limits.

    Raises:
        BadInput: ids are not all different, or not as many as texts.

    >>> text = "the loss is the compass of a language model and this keeps it true"
    >>> found = near_duplicates([text, "something else altogether", text.upper() + "!"])
    >>> list(found.pairs())
    [('00000000', '00000002', 1.0)]
    """
    step = step or NearDuplicateStep()
    return step.find(step.signatures(batch) for batch in batches_of(texts, ids))


def _annotations(found: NearDuplicates) -> pa.RecordBatch:
    """The columns of `NearDuplicateStep`, one row for each document, in the order of survival."""
    dropped_D = found.partner_D >= 0
    return pa.RecordBatch.from_arrays(
        [
            found.ids,
            cluster_names(found.ids, found.survivor_D),
            column(dropped_D),
            found.ids.take(column(found.partner_D, ~dropped_D)),
            column(found.partner_jaccard_D.astype(np.float32), ~dropped_D),
            found.ids.take(column(found.survivor_D, ~dropped_D)),
            column(found.survivor_jaccard_D.astype(np.float32), ~dropped_D),
        ],
        ["id", "cluster", "duplicate", "partner", "similarity", "survivor", "survivor_similarity"],
    )
