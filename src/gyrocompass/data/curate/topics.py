"""Topics: slices by what documents are about, found by clustering their vectors and named by their words.

    documents  --signatures--> vector                    (`encoders`)
    signatures --resolve-->    topic, how typical of it

Vectors gather about `topics` centres (k-means by cosine, `spherical`), documents taken in the order of their
ids. Topics are numbered from the largest. A topic is named by the words that tell its most typical documents
from those of the others: the largest n_w * log(1 + N / N_w), n_w of the topic's documents with the word, N
documents looked at, N_w of them with the word.

Shape legend: D documents, E dimensions, K topics.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from gyrocompass.data.curate.columns import column, numbers
from gyrocompass.data.curate.encoders import Float32Array
from gyrocompass.data.curate.semantic_duplicates import stacked, vectors
from gyrocompass.data.curate.spherical import centres, nearest
from gyrocompass.data.curate.step import CorpusAccess, GlobalStep, register
from gyrocompass.data.curate.words import Int64Array

_NAMED_BY = 50
"""Documents of a topic whose words are looked at."""
_WORDS = 3


@register
class TopicStep(GlobalStep):
    """Says what each document is about.

    Columns: `topic`, such as "03 kernel driver memory", and `typical`, the cosine with the topic's centre.

    Args:
        encoder: a name, or the folder of a model2vec model; see `encoders`.
        topics: how many; fewer where there are fewer documents.
        seed: of the first centres.
    """

    name: ClassVar[str] = "topics"
    encoder: str = "minilm"
    topics: int = Field(32, ge=1, le=4096)
    seed: int = 0

    def signatures(self, documents: pa.RecordBatch) -> pa.RecordBatch:
        """The vector of each document."""
        columns = [documents["id"], vectors(documents, self.encoder)]
        return pa.RecordBatch.from_arrays(columns, ["id", "vector"])

    def resolve(self, signatures: Iterator[pa.RecordBatch], corpus: CorpusAccess) -> pa.RecordBatch:
        """One row for each document, in the order of their ids."""
        known = [batch for batch in signatures if batch.num_rows]
        if not known:
            empty = [pa.array([], kind) for kind in (pa.string(), pa.string(), pa.float32())]
            return pa.RecordBatch.from_arrays(empty, ["id", "topic", "typical"])
        ids = pa.concat_arrays([batch["id"] for batch in known])
        order = pc.sort_indices(ids)
        ids = ids.take(order)
        vector_DE = stacked(known)[numbers(order)].astype(np.float32)
        place_D, cosine_D = nearest(vector_DE, centres(vector_DE, self.topics, self.seed))
        count_K = np.bincount(place_D)
        number_K = np.empty(len(count_K), np.int64)
        number_K[np.argsort(-count_K, kind="stable")] = np.arange(len(count_K))
        topic_D = number_K[place_D]
        names = _names(_typical(ids, topic_D, cosine_D), corpus)
        return pa.RecordBatch.from_arrays(
            [ids, pa.array([names[topic] for topic in topic_D.tolist()], pa.string()), column(cosine_D)],
            ["id", "topic", "typical"],
        )


def _typical(ids: pa.Array, topic_D: Int64Array, cosine_D: Float32Array) -> list[list[str]]:
    """The ids of the documents nearest to each topic's centre."""
    order = np.lexsort((-cosine_D, topic_D))
    begins = np.searchsorted(topic_D[order], np.arange(int(topic_D.max()) + 2))
    return [
        ids.take(column(order[begin : min(end, begin + _NAMED_BY)])).to_pylist()
        for begin, end in pairwise(begins.tolist())
    ]


def _names(typical: Sequence[list[str]], corpus: CorpusAccess) -> list[str]:
    """A name for each topic."""
    counts = []
    for ids in typical:
        texts = corpus.take(ids, ["text"])["text"].to_pylist() if ids else []
        words = (set(re.findall(r"[^\W\d_]{3,}", text.lower())) for text in texts)
        counts.append(Counter(word for found in words for word in found))
    whole: Counter[str] = sum(counts, Counter())
    documents = sum(map(len, typical))
    digits = len(str(len(typical) - 1))

    def told(count: Counter[str]) -> list[str]:
        return sorted(count, key=lambda word: (-count[word] * math.log(1 + documents / whole[word]), word))[
            :_WORDS
        ]

    return [" ".join([f"{number:0{digits}d}", *told(count)]) for number, count in enumerate(counts)]
