"""Exact duplicates: the same content, or the same but for case, white space and the way it is encoded.

    documents  --signatures--> two hashes of each, standing
    signatures --resolve-->    clusters, partners
    exact_duplicates(texts, ids) --> RecordBatch         (the same as a plain function)

Content is compared by its sha256; normalised content by 128 bits of the blake2b hash of the text after NFKC,
case folding, and with all white space taken out. Punctuation stays: `a + b` and `A+B` are the same, `a - b`
is another document. Of documents that are the same the first in the order of survival stays (`survivors`).

Memory: 32 bytes for the hashes of a document, and its id.

Shape legend: D documents.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar

import numpy as np
import pyarrow as pa

from gyrocompass.data.curate.clusters import cluster_names, first_of_equal
from gyrocompass.data.curate.columns import bytes_column, column
from gyrocompass.data.curate.given import batches_of
from gyrocompass.data.curate.step import CorpusAccess, GlobalStep, register
from gyrocompass.data.curate.survivors import STANDING, SurvivorRule, survival_order
from gyrocompass.data.curate.words import text_array

_WHITE_SPACE = "".join(chr(code) for code in range(128) if chr(code).isspace()).encode()
_LOWER = bytes(range(128)).lower() + bytes(range(128, 256))


@register
class ExactDuplicateStep(GlobalStep):
    """Marks documents that are the same as another one.

    Columns: `cluster`, the smallest id of those that are the same (null: alone), `duplicate` (whether another
    of them survives), `partner`, one that is preferred to it, `exact` (whether that has the same content to
    the last byte), and `similarity`, 1. The last three are null for documents that survive.

    Args:
        normalised: whether case, white space and compatibility forms are ignored.
        survivors: which one of duplicates stays.
    """

    name: ClassVar[str] = "exact_duplicates"
    normalised: bool = True
    survivors: SurvivorRule = SurvivorRule()

    def reads(self) -> tuple[str, ...]:
        """The column of quality, where the rule for survivors names one."""
        return () if self.survivors.quality is None else (self.survivors.quality,)

    def signatures(self, documents: pa.RecordBatch) -> pa.RecordBatch:
        """The hashes of each document, and how it stands among duplicates."""
        texts = text_array(documents["text"]).to_pylist()
        if "content_hash" in documents.schema.names:
            contents = [bytes.fromhex(digest)[:16] for digest in documents["content_hash"].to_pylist()]
        else:
            contents = [hashlib.sha256(text.encode()).digest()[:16] for text in texts]
        normal = [normalised_hash(text) for text in texts] if self.normalised else contents
        return pa.RecordBatch.from_arrays(
            [
                documents["id"],
                *self.survivors.standings(documents),
                bytes_column(contents, 16),
                bytes_column(normal, 16),
            ],
            ["id", *STANDING.names, "content", "normal"],
        )

    def resolve(self, signatures: Iterator[pa.RecordBatch], corpus: CorpusAccess) -> pa.RecordBatch:
        """One row for each document, in the order of survival."""
        return self.find(signatures)

    def find(self, signatures: Iterable[pa.RecordBatch]) -> pa.RecordBatch:
        """The columns of the step.

        Args:
            signatures: of all documents, in any order and any batches.
        """
        known = pa.concat_batches(list(signatures))
        known = known.take(column(survival_order(known["id"], known)))
        same_D = first_of_equal(*_halves(known["content"]))
        first_D = first_of_equal(*_halves(known["normal"]))  # what has the same content is among them
        exact_D = same_D != np.arange(len(same_D))
        partner_D = np.where(exact_D, same_D, first_D)
        survives_D = partner_D == np.arange(len(same_D))
        return pa.RecordBatch.from_arrays(
            [
                known["id"],
                cluster_names(known["id"], first_D),
                column(~survives_D),
                known["id"].take(column(partner_D, survives_D)),
                column(exact_D, survives_D),
                column(np.ones(len(same_D), np.float32), survives_D),
            ],
            ["id", "cluster", "duplicate", "partner", "exact", "similarity"],
        )


def exact_duplicates(
    texts: Iterable[str], ids: Sequence[str] | None = None, step: ExactDuplicateStep | None = None
) -> pa.RecordBatch:
    """Exact duplicates among texts: the columns of `ExactDuplicateStep`, a row for each text.

    Args:
        texts: read once, and not kept.
        ids: one for each text, all different; None: their places, "00000000", "00000001", ...
        step: what counts as the same.

    Raises:
        BadInput: ids are not all different, or not as many as texts.

    >>> found = exact_duplicates(["One two.", "three", "one  TWO."], ["a", "b", "c"])
    >>> found.filter(found["duplicate"]).select(["id", "partner", "exact"]).to_pylist()
    [{'id': 'c', 'partner': 'a', 'exact': False}]
    """
    step = step or ExactDuplicateStep()
    return step.find(step.signatures(batch) for batch in batches_of(texts, ids))


def normalised_hash(text: str) -> bytes:
    """16 bytes: equal for texts that are the same but for case, white space and compatibility forms.

    >>> normalised_hash("Stra\\u00dfe 1\\n") == normalised_hash("STRASSE\\u00a0\\uff11")
    True
    """
    if text.isascii():
        content = text.encode().translate(_LOWER, _WHITE_SPACE)
    else:
        folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
        content = "".join(folded.split()).encode()
    return hashlib.blake2b(content, digest_size=16).digest()


def _halves(digests: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """16-byte hashes as two numbers each."""
    whole = np.frombuffer(b"".join(digests.to_pylist()), np.uint64).reshape(-1, 2)
    return whole[:, 0], whole[:, 1]
