"""Semantic duplicates: documents that say the same in other words, by the cosine of their vectors.

    documents  --signatures--> vector, standing          (`encoders`)
    signatures --resolve-->    clusters, partners, cosines
    semantic_duplicates(texts, ids) --> RecordBatch      (the same as a plain function)

Documents are numbered in the order of survival (`survivors`), and pairs with a cosine at or above the
threshold are joined. Up to `exact_up_to` documents all pairs are compared. Beyond it, documents are compared
within regions of about `region` of them (SemDeDup, Abbas et al. 2023), centres found by k-means
(`spherical`); each belongs to the regions of its two nearest centres, so that neighbours on either side of a
border still meet.

What the threshold means depends on the encoder, and a cosine is no proof: these are candidates for a rule to
choose from, with the partner and the cosine of each. Vectors are kept with 16 bits a number.

Memory: two bytes for each dimension and document.

Shape legend: D documents, E dimensions, P pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from gyrocompass.data.curate.clusters import cluster_names, roots
from gyrocompass.data.curate.columns import column, numbers
from gyrocompass.data.curate.encoders import Float32Array, load_encoder, unit_rows
from gyrocompass.data.curate.given import batches_of
from gyrocompass.data.curate.spherical import centres, nearest
from gyrocompass.data.curate.step import CorpusAccess, GlobalStep, register
from gyrocompass.data.curate.survivors import STANDING, SurvivorRule, survival_order
from gyrocompass.data.curate.words import Int64Array, text_array

_ROWS_AT_ONCE = 1024
Float16Array = npt.NDArray[np.float16]


@register
class SemanticDuplicateStep(GlobalStep):
    """Marks documents that mean nearly what another one means.

    Columns: `cluster`, the smallest id of those that belong together (null: alone), `duplicate` (whether
    another of them survives), `partner` and `similarity`, `survivor` and `survivor_similarity`; similarities
    are cosines. All but the first two are null for documents that survive.

    Args:
        encoder: a name, or the folder of a model2vec model; see `encoders`.
        threshold: the least cosine of duplicates.
        exact_up_to: documents of which all pairs are compared.
        region: about how many are compared with each other beyond that.
        seed: of the regions.
        survivors: which one of duplicates stays.
    """

    name: ClassVar[str] = "semantic_duplicates"
    encoder: str = "minilm"
    threshold: float = Field(0.95, gt=0, le=1)
    exact_up_to: int = Field(20_000, ge=0)
    region: int = Field(2000, ge=1)
    seed: int = 0
    survivors: SurvivorRule = SurvivorRule()

    def reads(self) -> tuple[str, ...]:
        """The column of quality, where the rule for survivors names one."""
        return () if self.survivors.quality is None else (self.survivors.quality,)

    def signatures(self, documents: pa.RecordBatch) -> pa.RecordBatch:
        """The vector of each document, and how it stands among duplicates."""
        columns = [documents["id"], *self.survivors.standings(documents), vectors(documents, self.encoder)]
        return pa.RecordBatch.from_arrays(columns, ["id", *STANDING.names, "vector"])

    def resolve(self, signatures: Iterator[pa.RecordBatch], corpus: CorpusAccess) -> pa.RecordBatch:
        """One row for each document, in the order of survival."""
        return self.find(signatures)

    def find(self, signatures: Iterable[pa.RecordBatch]) -> pa.RecordBatch:
        """The columns of the step.

        Args:
            signatures: of all documents, in any order and any batches.
        """
        known = [batch for batch in signatures if batch.num_rows]
        if not known:
            return _Joined(np.empty((0, 1), np.float16), self.threshold).annotations(
                pa.array([], pa.string())
            )
        standings = pa.concat_batches([batch.select(["id", *STANDING.names]) for batch in known])
        order_D = survival_order(standings["id"], standings)
        joined = _Joined(stacked(known)[order_D], self.threshold)
        for region in self._regions(joined.vector_DE):
            joined.compare(region)
        return joined.annotations(standings["id"].take(column(order_D)))

    def _regions(self, vector_DE: Float16Array) -> Iterator[Int64Array]:
        """Documents that are compared with each other, ascending."""
        if len(vector_DE) <= self.exact_up_to:
            yield np.arange(len(vector_DE))
            return
        wide_DE = vector_DE.astype(np.float32)
        centre_KE = centres(wide_DE, -(-len(wide_DE) // self.region), self.seed)
        first_D, _ = nearest(wide_DE, centre_KE)
        second_D = _second(wide_DE, centre_KE, first_D)
        for centre in range(len(centre_KE)):
            yield np.flatnonzero((first_D == centre) | (second_D == centre))


def semantic_duplicates(
    texts: Iterable[str], ids: Sequence[str] | None = None, step: SemanticDuplicateStep | None = None
) -> pa.RecordBatch:
    """Semantic duplicates among texts: the columns of `SemanticDuplicateStep`, a row for each text.

    Args:
        texts: read once, and not kept.
        ids: one for each text, all different; None: their places, "00000000", "00000001", ...
        step: encoder and threshold.

    Raises:
        BadInput: ids are not all different, or not as many as texts; there is no such encoder.
        MissingDependency: the encoder's packages are not installed.

    >>> step = SemanticDuplicateStep(encoder="words", threshold=0.9)
    >>> found = semantic_duplicates(["the cat sat", "a dog ran away", "Sat the cat?"], step=step)
    >>> found["cluster"].to_pylist()
    ['00000000', None, '00000000']
    """
    step = step or SemanticDuplicateStep()
    return step.find(step.signatures(batch) for batch in batches_of(texts, ids))


def vectors(documents: pa.RecordBatch, encoder: str) -> pa.Array:
    """The vectors of a batch, of length 1, with 16 bits a number; an empty batch needs no encoder."""
    if not documents.num_rows:
        return pa.array([], pa.list_(pa.float16()))
    vector_DE = unit_rows(load_encoder(encoder)(text_array(documents["text"]).to_pylist())).astype(np.float16)
    begin_D1 = np.arange(len(vector_DE) + 1, dtype=np.int32) * np.int32(vector_DE.shape[1])
    return pa.ListArray.from_arrays(column(begin_D1), column(vector_DE.reshape(-1)))


def stacked(signatures: Sequence[pa.RecordBatch]) -> Float16Array:
    """The vectors of batches that hold some: [D, E]."""
    parts = [numbers(batch["vector"].flatten()).reshape(batch.num_rows, -1) for batch in signatures]
    return np.concatenate(parts)


class _Joined:
    """What was joined so far, and the nearest document to each."""

    def __init__(self, vector_DE: Float16Array, threshold: float) -> None:
        self.vector_DE, self._threshold = vector_DE, np.float32(threshold)
        self._root_D = np.arange(len(vector_DE))
        # The nearest of those that are preferred, and the nearest of the others.
        self._partner_2D = np.full((2, len(vector_DE)), -1)
        self._cosine_2D = np.full((2, len(vector_DE)), -np.inf, np.float32)

    def compare(self, documents: Int64Array) -> None:
        """All pairs of some documents."""
        for start in range(0, len(documents), _ROWS_AT_ONCE):
            rows = documents[start : start + _ROWS_AT_ONCE]
            wide_RE = self.vector_DE[rows].astype(np.float32)
            for begin in range(start, len(documents), _ROWS_AT_ONCE):
                columns = documents[begin : begin + _ROWS_AT_ONCE]
                cosine_RC = wide_RE @ self.vector_DE[columns].astype(np.float32).T
                near_RC = (cosine_RC >= self._threshold) & (rows[:, None] < columns)
                if near_RC.any():
                    self._join(rows, columns, np.where(near_RC, cosine_RC, np.float32(-np.inf)))

    def annotations(self, ids: pa.Array) -> pa.RecordBatch:
        """The columns of `SemanticDuplicateStep`."""
        dropped_D = self._root_D != np.arange(len(self._root_D))
        other_D = (self._partner_2D[0] < 0).astype(np.int64)
        every = np.arange(len(self._root_D))
        partner_D, cosine_D = self._partner_2D[other_D, every], self._cosine_2D[other_D, every]
        survivor_cosine_D = np.zeros(len(every), np.float32)
        for start in range(0, len(every), _ROWS_AT_ONCE):
            rows = every[start : start + _ROWS_AT_ONCE]
            pair = (self.vector_DE[one].astype(np.float32) for one in (rows, self._root_D[rows]))
            survivor_cosine_D[rows] = np.multiply(*pair).sum(axis=1)
        return pa.RecordBatch.from_arrays(
            [
                ids,
                cluster_names(ids, self._root_D),
                column(dropped_D),
                ids.take(column(partner_D, ~dropped_D)),
                column(cosine_D, ~dropped_D),
                ids.take(column(self._root_D, ~dropped_D)),
                column(survivor_cosine_D, ~dropped_D),
            ],
            ["id", "cluster", "duplicate", "partner", "similarity", "survivor", "survivor_similarity"],
        )

    def _join(self, rows: Int64Array, columns: Int64Array, cosine_RC: Float32Array) -> None:
        """Pairs of a block; those that are not near are -inf."""
        left, right = np.nonzero(cosine_RC > -np.inf)
        self._root_D = roots(self._root_D, rows[left], columns[right])
        self._nearer(0, columns, rows, cosine_RC.T)
        self._nearer(1, rows, columns, cosine_RC)

    def _nearer(self, side: int, documents: Int64Array, others: Int64Array, cosine_DO: Float32Array) -> None:
        """Partners that are nearer than those known; of equally near ones the preferred."""
        place_D = cosine_DO.argmax(axis=1)
        other_D, best_D = others[place_D], cosine_DO[np.arange(len(documents)), place_D]
        known_D, partner_D = self._cosine_2D[side, documents], self._partner_2D[side, documents]
        better = (best_D > known_D) | ((best_D == known_D) & (best_D > -np.inf) & (other_D < partner_D))
        self._cosine_2D[side, documents[better]] = best_D[better]
        self._partner_2D[side, documents[better]] = other_D[better]


def _second(vector_DE: Float32Array, centre_KE: Float32Array, first_D: Int64Array) -> Int64Array:
    """The next nearest centre of each vector; the nearest where it is the only one."""
    second_D = first_D.copy()
    for start in range(0, len(vector_DE), _ROWS_AT_ONCE) if len(centre_KE) > 1 else ():
        cosine_DK = vector_DE[start : start + _ROWS_AT_ONCE] @ centre_KE.T
        cosine_DK[np.arange(len(cosine_DK)), first_D[start : start + _ROWS_AT_ONCE]] = -np.inf
        second_D[start : start + _ROWS_AT_ONCE] = cosine_DK.argmax(axis=1)
    return second_D
