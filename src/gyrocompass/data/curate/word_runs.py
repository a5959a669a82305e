"""The words of a batch and hashes of any run of them, all at once.

    Joined --Words--> start_W, end_W, row_W;  ngram_hashes(n) -> one uint64 for each run of n words

A word is a run of letters and digits, in small letters; what stands between words does not count. The hash of
a run is that of its words with one space between them, whatever stood there, so that it is the same in any
layout and any batch:

    h(c_0 ... c_m) = mix(sum of c_i B^i modulo 2^64)

Sums over prefixes give the hash of every run in a few passes. Equal runs have equal hashes; different ones
share one with a chance of about 2^-64 for texts that were not made to collide, and where a collision would
matter the caller compares the words themselves.

Left out: normal forms of Unicode. Ingestion has made texts NFC.

Shape legend: N characters of the joined text, C of the compact one, W words, G runs of words, D documents.
"""

from __future__ import annotations

from functools import cache, cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gyrocompass.data.curate.joined import Flags, Int64Array, Joined, runs

Hashes = NDArray[np.uint64]

_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
_PLANE = 0x10000
_SPACE = 32


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


class Words:
    """The words of a batch.

    Args:
        joined: its texts.
    """

    def __init__(self, joined: Joined) -> None:
        self.joined = joined
        letter_N = is_letter(joined)
        self.start_W, self.end_W = runs(letter_N)
        """Where each word stands in the joined text."""
        self.row_W: Int64Array = joined.rows_of(self.start_W)
        self.length_W: Int64Array = self.end_W - self.start_W
        self._letter_N = letter_N

    @cached_property
    def n_words_D(self) -> Int64Array:
        """Words of each document."""
        return np.bincount(self.row_W, minlength=len(self.joined.texts))

    @cached_property
    def _prefix_C(self) -> Hashes:
        """Sums over prefixes of the compact text: small letters, and one space behind each word."""
        if self.joined.text.isascii():
            small_N = _lower_table()[self.joined.code_N]
        else:
            code_N = self.joined.point_N
            small_N = np.where(code_N < _PLANE, _lower_table()[np.minimum(code_N, _PLANE - 1)], code_N)
        kept_N = self._letter_N.copy()
        behind = self.end_W[self.end_W < len(kept_N)]
        kept_N[behind] = True
        small_N[behind] = _SPACE
        return prefix_hashes(small_N[kept_N])

    @cached_property
    def _compact_start_W(self) -> Int64Array:
        """Where each word starts in the compact text."""
        return np.cumsum(self.length_W + 1) - self.length_W - 1

    def ngram_hashes(self, n: int) -> tuple[Int64Array, Hashes]:
        """The runs of n words that lie in one document: the first word of each, and its hash."""
        first_G = np.arange(max(len(self.start_W) - n + 1, 0))
        first_G = first_G[self.row_W[first_G] == self.row_W[first_G + n - 1]]
        start_G = self._compact_start_W[first_G]
        end_G = self._compact_start_W[first_G + n - 1] + self.length_W[first_G + n - 1]
        return first_G, range_hashes(self._prefix_C, start_G, end_G)


def prefix_hashes(code_N: NDArray[Any]) -> Hashes:
    """Sums over prefixes for `range_hashes`: one more than there are characters."""
    power_N = _powers(len(code_N))[0]
    sums = np.zeros(len(code_N) + 1, np.uint64)
    np.cumsum((code_N.astype(np.uint64) + np.uint64(1)) * power_N, out=sums[1:])
    return sums


def range_hashes(prefix: Hashes, start_G: Int64Array, end_G: Int64Array) -> Hashes:
    """The hash of each range of characters, the same wherever it stands."""
    inverse_N = _powers(len(prefix) - 1)[1]
    if not len(start_G):
        return np.zeros(0, np.uint64)
    return mix((prefix[end_G] - prefix[start_G]) * inverse_N[np.minimum(start_G, len(inverse_N) - 1)])


def mix(hashes: Hashes) -> Hashes:
    """Spread the bits of each number over all of it (the finaliser of splitmix64)."""
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return hashes ^ (hashes >> np.uint64(31))


def hash_words(words: str) -> int:
    """The hash of all of one text's words, as `ngram_hashes` gives it for as many.

    >>> hash_words("Hello,  World") == hash_words("hello world")
    True
    """
    small = " ".join(word_list(words))
    code_N = np.frombuffer(small.encode("utf-32-le"), np.uint32)
    return int(range_hashes(prefix_hashes(code_N), np.array([0]), np.array([len(code_N)]))[0])


def word_list(text: str) -> list[str]:
    """The words of a text in small letters.

    >>> word_list("It's 3 o'clock")
    ['it', 's', '3', 'o', 'clock']
    """
    words = Words(Joined([text]))
    return [small_letters(text[s:e]) for s, e in zip(words.start_W.tolist(), words.end_W.tolist(), strict=True)]


def small_letters(text: str) -> str:
    """A text in small letters, character by character: its length stays."""
    small = text.lower()
    return small if len(small) == len(text) else "".join(c.lower() if len(c.lower()) == 1 else c for c in text)


_POWERS: list[tuple[Hashes, Hashes]] = []


def _powers(n: int) -> tuple[Hashes, Hashes]:
    """B^i and B^-i modulo 2^64 for the first n numbers; kept, and made again only for more."""
    if not _POWERS or len(_POWERS[0][0]) < n:
        size = max(n, 1 << 16, 2 * len(_POWERS[0][0]) if _POWERS else 0)
        inverse = pow(_BASE, -1, 2**64)
        _POWERS[:] = [(_geometric(_BASE, size), _geometric(inverse, size))]
    power_N, inverse_N = _POWERS[0]
    return power_N[:n], inverse_N[: max(n, 1)]


def _geometric(base: int, n: int) -> Hashes:
    factors = np.full(n, base, np.uint64)
    factors[0] = 1
    return np.multiply.accumulate(factors)
