"""What can be counted of a batch at once: words, lines, and kinds of characters of each document.

Words are parted by white space, lines by newlines; a line that holds nothing but white space is empty and
does not count. All counts are exact, and those of a document do not depend on its neighbours.

Shape legend: N characters of the joined text, D documents, W words, L lines that are not empty.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gyrocompass.data.curate.joined import Flags, Int64Array, Joined, is_any, runs
from gyrocompass.data.curate.word_runs import is_letter

Float64Array = NDArray[np.float64]

WHITE = " \t\n\r\x0b\x0c\0\x85\xa0"


class TextShape:
    """Words and lines of a batch.

    Args:
        joined: its texts.
    """

    def __init__(self, joined: Joined) -> None:
        self.joined = joined
        self.n_documents = len(joined.texts)
        self.white_N: Flags = is_any(joined.code_N, WHITE)
        self.start_W, self.end_W = runs(~self.white_N)
        self.row_W: Int64Array = joined.rows_of(self.start_W)
        self.length_W: Int64Array = self.end_W - self.start_W

    @cached_property
    def letter_N(self) -> Flags:
        """Whether each character is a letter or a digit."""
        return is_letter(self.joined)

    @cached_property
    def n_words_D(self) -> Int64Array:
        """Words of each document."""
        return np.bincount(self.row_W, minlength=self.n_documents)

    @cached_property
    def _line_of_word_W(self) -> Int64Array:
        newline_N = self.joined.positions("\n")
        return np.searchsorted(newline_N, self.start_W)

    @cached_property
    def first_word_L(self) -> Int64Array:
        """The first word of each line that has one."""
        line_W = self._line_of_word_W
        return np.flatnonzero(np.diff(line_W, prepend=-1))

    @cached_property
    def last_word_L(self) -> Int64Array:
        """The last word of each line."""
        return np.append(self.first_word_L[1:], len(self.start_W))[: len(self.first_word_L)] - 1

    @cached_property
    def start_L(self) -> Int64Array:
        """Where the words of each line start."""
        return self.start_W[self.first_word_L]

    @cached_property
    def end_L(self) -> Int64Array:
        """Where they end."""
        return self.end_W[self.last_word_L]

    @cached_property
    def row_L(self) -> Int64Array:
        """The document of each line."""
        return self.row_W[self.first_word_L]

    @cached_property
    def n_lines_D(self) -> Int64Array:
        """Lines of each document that are not empty."""
        return np.bincount(self.row_L, minlength=self.n_documents)

    def per_document(self, rows: Int64Array, weights: Any) -> Float64Array:
        """The sum over these rows of each document."""
        return np.asarray(np.bincount(rows, weights, minlength=self.n_documents), np.float64)

    def count_characters(self, flag_N: Flags) -> Float64Array:
        """How many of a document's characters have a flag."""
        sums = np.concatenate([[0], np.cumsum(flag_N, dtype=np.int64)])
        start_D, end_D = self.joined.start_D, self.joined.start_D + self.joined.length_D
        return np.asarray(sums[end_D] - sums[start_D], np.float64)

    def any_in_words(self, flag_N: Flags) -> Flags:
        """Whether each word holds a character with a flag."""
        if not len(self.start_W):
            return np.zeros(0, np.bool_)
        sums = np.concatenate([[0], np.cumsum(flag_N, dtype=np.int64)])
        return np.asarray(sums[self.end_W] > sums[self.start_W])


def ratio(numerator: Any, denominator: Any) -> Float64Array:
    """Quotients; 0 where there is nothing to divide by.

    >>> ratio(np.array([1.0, 2.0]), np.array([4, 0])).tolist()
    [0.25, 0.0]
    """
    numerator = np.asarray(numerator, np.float64)
    quotient: Float64Array = np.zeros(numerator.shape)
    np.divide(numerator, denominator, out=quotient, where=np.asarray(denominator) != 0)
    return quotient
