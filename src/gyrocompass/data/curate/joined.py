"""The texts of a batch as one string, so that a scan is one pass and not one for each document.

    texts --join--> text "doc 1 \\n\\0\\n doc 2 ...", code_N, start_D

Every position of `text` is also one of `code_N`, whose 8-bit codes numpy can search: a character beyond
Latin-1 is 26 there. No pattern of this package crosses a NUL, so that what is found in a document
depends on it alone and not on its neighbours in the batch.

Shape legend: N characters of the joined text, D documents, H hits.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Int64Array = NDArray[np.int64]
Flags = NDArray[np.bool_]

SEPARATOR = "\n\0\n"


class Joined:
    """The texts of a batch, joined.

    Args:
        texts: one a document; None counts as empty.

    >>> joined = Joined(["ab", "c@d"])
    >>> joined.rows_of(joined.positions("@")).tolist(), joined.start_D.tolist()
    ([1], [0, 5])
    """

    def __init__(self, texts: list[str | None]) -> None:
        self.texts = [text or "" for text in texts]
        self.text = SEPARATOR.join(self.texts)
        length_D = np.fromiter((len(text) for text in self.texts), np.int64, len(self.texts))
        self.start_D: Int64Array = np.cumsum(length_D + len(SEPARATOR)) - length_D - len(SEPARATOR)
        self.length_D: Int64Array = length_D

    @classmethod
    def of(cls, documents: pa.RecordBatch, column: str = "text") -> Joined:
        """The texts of a batch of documents."""
        return cls(documents.column(column).to_pylist())

    @cached_property
    def code_N(self) -> NDArray[np.uint8]:
        """Latin-1 code of each character, 26 (the substitute character) beyond it."""
        if self.text.isascii():
            return np.frombuffer(self.text.encode("ascii"), np.uint8)
        return np.where(self.point_N < 256, self.point_N, 26).astype(np.uint8)

    @cached_property
    def point_N(self) -> NDArray[np.uint32]:
        """Code point of each character."""
        return np.frombuffer(self.text.encode("utf-32-le", "surrogatepass"), np.uint32)

    def positions(self, character: str) -> Int64Array:
        """Where a Latin-1 character stands."""
        return np.flatnonzero(self.code_N == ord(character))

    def rows_of(self, position_H: Any) -> Int64Array:
        """The document of each position."""
        return np.asarray(np.searchsorted(self.start_D, position_H, side="right") - 1, np.int64)


def is_any(code_N: NDArray[np.uint8], characters: str) -> Flags:
    """Whether each code is one of some Latin-1 characters.

    >>> is_any(np.frombuffer(b"a-b", np.uint8), "-.").tolist()
    [False, True, False]
    """
    table = np.zeros(256, dtype=np.bool_)
    table[list(characters.encode("latin-1"))] = True
    return table[code_N]


def runs(flag_N: Flags) -> tuple[Int64Array, Int64Array]:
    """Start and end of each run of true flags.

    >>> [part.tolist() for part in runs(np.array([True, True, False, True]))]
    [[0, 3], [2, 4]]
    """
    edge = np.flatnonzero(np.diff(flag_N, prepend=False, append=False))
    return edge[::2], edge[1::2]
