"""The words of a batch, where each stands, and hashes of any run of them, all at once.

    Joined --WordRuns--> start_W, end_W, row_W;  ngram_hashes(n) -> one uint64 for each run of n words

A word is a run of letters and digits in small letters, and each character of a script that is written without
spaces is one by itself, as for duplicates (`words`). What stands between words does not count, so that the
hash of a run of words is the same in any layout, at any place and in any batch:

    word  h(c_0 ... c_m) = mix(sum of (c_i + 1) B^i)            run  h(w_0 ... w_n) = mix(sum of h(w_i) B^i)

modulo 2^64. Sums over prefixes give the hash of every run in a few passes. Equal runs have equal hashes;
different ones share one with a chance of about 2^-64 for texts that were not made to collide, and where a
collision would matter the caller compares the words themselves.

This differs from `words` in what it keeps: there hashes alone, for speed; here the place of each word too. An
underscore parts words here, because a benchmark's `snake_case` may be written in either way.

Shape legend: N characters of the joined text, W words, G runs of words, D documents.
"""

from __future__ import annotations

from functools import cache, cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gyrocompass.data.curate.joined import Flags, Int64Array, Joined
from gyrocompass.data.curate.words import SPACELESS

Hashes = NDArray[np.uint64]

_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
_PLANE = 0x10000


@cache
def _letter_table() -> Flags:
    """Whether each character of the basic plane is a letter or a digit."""
    return np.array([chr(code).isalnum() for code in range(_PLANE)])


@cache
def _lower_table() -> NDArray[np.uint32]:
    """Each character of the basic plane in small letters, where that is one character."""
    lower = [chr(code).lower() for code in range(_PLANE)]
    return np.array([ord(small) if len(small) == 1 else code for code, small in enumerate(lower)], np.uint32)


def is_letter(joined: Joined) -> Flags:
    """Whether each character is a letter or a digit; beyond the basic plane all but symbols are.

    >>> is_letter(Joined(["a-é中😀"])).tolist()
    [True, False, True, True, False]
    """
    if joined.text.isascii():
        return _letter_table()[joined.code_N]
    code_N = joined.point_N
    flag_N = _letter_table()[np.minimum(code_N, _PLANE - 1)]
    beyond = code_N >= _PLANE
    flag_N[beyond] = (code_N[beyond] < 0x1F000) | (code_N[beyond] >= 0x20000)
    return flag_N


class WordRuns:
    """The words of a batch.

    Args:
        joined: its texts.
    """

    def __init__(self, joined: Joined) -> None:
        self.joined = joined
        letter_N = is_letter(joined)
        begins_N, ends_N = letter_N.copy(), letter_N.copy()
        begins_N[1:] &= ~letter_N[:-1]
        ends_N[:-1] &= ~letter_N[1:]
        if not joined.text.isascii():
            alone_N = letter_N & _is_spaceless(joined.point_N)
            begins_N |= alone_N
            ends_N |= alone_N
            begins_N[1:] |= alone_N[:-1] & letter_N[1:]
            ends_N[:-1] |= alone_N[1:] & letter_N[:-1]
        self.start_W: Int64Array = np.flatnonzero(begins_N)
        self.end_W: Int64Array = np.flatnonzero(ends_N) + 1
        """Where each word stands in the joined text."""
        self.row_W: Int64Array = joined.rows_of(self.start_W)
        self.length_W: Int64Array = self.end_W - self.start_W

    @cached_property
    def n_words_D(self) -> Int64Array:
        """Words of each document."""
        return np.bincount(self.row_W, minlength=len(self.joined.texts))

    @cached_property
    def _word_sums(self) -> Hashes:
        """Sums over the hashes of single words."""
        if self.joined.text.isascii():
            small_N = _lower_table()[self.joined.code_N]
        else:
            code_N = self.joined.point_N
            small_N = np.where(code_N < _PLANE, _lower_table()[np.minimum(code_N, _PLANE - 1)], code_N)
        return prefix_hashes(range_hashes(prefix_hashes(small_N), self.start_W, self.end_W))

    def ngram_hashes(self, n: int) -> tuple[Int64Array, Hashes]:
        """The runs of n words that lie in one document: the first word of each, and its hash."""
        first_G = np.arange(max(len(self.start_W) - n + 1, 0))
        first_G = first_G[self.row_W[first_G] == self.row_W[first_G + n - 1]]
        return first_G, range_hashes(self._word_sums, first_G, first_G + n)


def _is_spaceless(code_N: NDArray[np.uint32]) -> Flags:
    """Whether each character belongs to a script that is written without spaces."""
    edges = np.array([edge for low, high in sorted(SPACELESS) for edge in (low, high + 1)], np.uint32)
    return np.asarray(np.searchsorted(edges, code_N, side="right") % 2 == 1)


def prefix_hashes(code_N: NDArray[Any]) -> Hashes:
    """Sums over prefixes for `range_hashes`: one more than there are numbers."""
    sums = np.zeros(len(code_N) + 1, np.uint64)
    np.cumsum((code_N.astype(np.uint64) + np.uint64(1)) * _powers(len(code_N))[0], out=sums[1:])
    return sums


def range_hashes(prefix: Hashes, start_G: Int64Array, end_G: Int64Array) -> Hashes:
    """The hash of each range of numbers, the same wherever it stands."""
    inverse_N = _powers(len(prefix))[1]
    return mix((prefix[end_G] - prefix[start_G]) * inverse_N[start_G])


def mix(hashes: Hashes) -> Hashes:
    """Spread the bits of each number over all of it (the finaliser of splitmix64)."""
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return hashes ^ (hashes >> np.uint64(31))


def hash_words(text: str) -> int:
    """The hash of all of one text's words, as `ngram_hashes` gives it for as many.

    >>> hash_words("Hello,  World") == hash_words("hello world")
    True
    """
    words = WordRuns(Joined([text]))
    n = len(words.start_W)
    return int(words.ngram_hashes(n)[1][0]) if n else 0


def word_list(text: str) -> list[str]:
    """The words of a text in small letters.

    >>> word_list("It's 3 o'clock")
    ['it', 's', '3', 'o', 'clock']
    """
    words = WordRuns(Joined([text]))
    return [
        small_letters(text[s:e]) for s, e in zip(words.start_W.tolist(), words.end_W.tolist(), strict=True)
    ]


def small_letters(text: str) -> str:
    """A text in small letters, character by character: its length stays."""
    small = text.lower()
    is_plain = len(small) == len(text) and "σ" not in small and "ς" not in small
    return small if is_plain else "".join(c.lower() if len(c.lower()) == 1 else c for c in text)


_POWERS: list[tuple[Hashes, Hashes]] = []


def _powers(n: int) -> tuple[Hashes, Hashes]:
    """B^i and B^-i modulo 2^64 for the first n numbers; kept, and made again only for more."""
    if not _POWERS or len(_POWERS[0][0]) < n:
        size = max(n, 1 << 16, 2 * len(_POWERS[0][0]) if _POWERS else 0)
        inverse = pow(_BASE, -1, 2**64)
        _POWERS[:] = [(_geometric(_BASE, size), _geometric(inverse, size))]
    power_N, inverse_N = _POWERS[0]
    return power_N[:n], inverse_N[:n]


def _geometric(base: int, n: int) -> Hashes:
    factors = np.full(n, base, np.uint64)
    factors[0] = 1
    return np.multiply.accumulate(factors)
