"""Importance of documents for a target, by hashed words alone (DSIR: Xie et al. 2023).

    target texts, raw texts --> log p(bucket), log q(bucket)    words and pairs of words, hashed into buckets
    document                --> log_weight = sum over its features of log p - log q

`per_feature` is the mean instead of the sum, which does not favour length. `noisy` adds noise drawn from the
document's id as -log(-log u): the documents with the k highest values are a sample of k, without replacement,
with chances in proportion to the weights; the same in every run and in any order.

Left out: learned features; a difference of two models does that (`likelihood`).
"""

from __future__ import annotations

from functools import lru_cache
from typing import ClassVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from gyrocompass.core.errors import BadInput
from gyrocompass.data.curate.blocks import by_blocks
from gyrocompass.data.curate.content_file import ContentFile
from gyrocompass.data.curate.joined import Joined
from gyrocompass.data.curate.step import RecordStep, register
from gyrocompass.data.curate.text_shape import ratio
from gyrocompass.data.curate.word_runs import WordRuns, hash_words

_LONGEST = 2
_CHUNK = 4096


@register
class Importance(RecordStep):
    """Weighs documents by how much more likely their words are in a target than in everything.

    Args:
        target: a file of texts like those that are wanted, one a line.
        raw: a file of texts like those there are, one a line.
        buckets: of features.
    """

    name: ClassVar[str] = "importance"

    target: ContentFile
    raw: ContentFile
    buckets: int = Field(10_000, ge=2, le=2**24)

    def annotate(self, documents: pa.RecordBatch) -> pa.RecordBatch:
        """`log_weight`, `per_feature` and `noisy`, in nats.

        Raises:
            BadInput: a file cannot be read or has no words.
        """
        return by_blocks(documents, self._annotate)

    def _annotate(self, documents: pa.RecordBatch) -> pa.RecordBatch:
        row, bucket = features(Joined.of(documents), self.buckets)
        weight = np.bincount(row, _log_ratio(self)[bucket], documents.num_rows)
        n_features = np.bincount(row, minlength=documents.num_rows)
        ids = documents.column("id").to_pylist()
        uniform = np.array([(hash_words(f"gumbel {id_}") + 0.5) / 2.0**64 for id_ in ids], np.float64)
        noisy = weight - np.log(-np.log(np.clip(uniform, 1e-300, 1 - 1e-16)))
        columns = {"log_weight": weight, "per_feature": ratio(weight, n_features), "noisy": noisy}
        return pa.RecordBatch.from_pydict(
            {"id": documents.column("id")} | {name: pa.array(x, pa.float64()) for name, x in columns.items()}
        )


def features(joined: Joined, buckets: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The document and the bucket of each word and each pair of words."""
    words = WordRuns(joined)
    found = [words.ngram_hashes(n) for n in range(1, _LONGEST + 1)]
    row = np.concatenate([words.row_W[first_G] for first_G, _ in found])
    return row, np.concatenate([hash_G % np.uint64(buckets) for _, hash_G in found]).astype(np.int64)


@lru_cache(maxsize=4)
def _log_ratio(step: Importance) -> NDArray[np.float64]:
    """log p(bucket) - log q(bucket), with one count added to each."""
    counts = [1.0 + _counts(file, step.buckets) for file in (step.target, step.raw)]
    return np.asarray(np.log(counts[0] / counts[0].sum()) - np.log(counts[1] / counts[1].sum()))


def _counts(file: ContentFile, buckets: int) -> NDArray[np.int64]:
    total = np.zeros(buckets, np.int64)
    try:
        lines = file.path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"the texts cannot be read: {error}", where=file.path) from None
    for start in range(0, len(lines), _CHUNK):
        total += np.bincount(
            features(Joined(list(lines[start : start + _CHUNK])), buckets)[1], minlength=buckets
        )
    if not total.any():
        raise BadInput("there are no words to learn a distribution from", where=file.path)
    return total
