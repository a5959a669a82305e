"""Shingles and MinHash: which documents are worth comparing.

    Words --shingles--> Shingles        every run of k words, as one 64-bit number
    Shingles --band_keys--> key_DB      equal keys in some band: candidates

A shingle is k words in a row; a document of fewer words has one shingle, all its words; a document without
words has none. The Jaccard similarity of two documents is that of their sets of shingles,

    J(A, B) = |A & B| / |A | B|.

For a random permutation of all numbers, the chance that A and B have the same least shingle is J.
Permutations are x -> a * x + c mod 2^32 over the upper half of the shingle, a odd; x is well mixed already,
so that this is enough (measured: the share of equal minima is J within its binomial error,
`tests/data/curate`). A band joins the minima of r permutations to one key; of b bands at least one agrees
with the chance

    1 - (1 - J^r)^b,

at b = 25 and r = 5: .063 at J = .3, .553 at .5, .990 at .7, .9998 at .8. Bands this loose propose many pairs
that are far apart; comparing the sets themselves (`jaccard`) is cheap and settles them.

Shape legend: D documents, W words, S shingles, B bands, P permutations.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from gyrocompass.data.curate.words import Int64Array, UInt64Array, Words, mix

UInt32Array = npt.NDArray[np.uint32]


class Shingles(NamedTuple):
    """The shingles of some documents, one after another, in the order of the text, repeated as they
    repeat."""

    hash_S: UInt64Array
    begin_D1: Int64Array
    """Document d has the shingles begin_D1[d] to begin_D1[d + 1]."""


def shingles(words: Words, length: int) -> Shingles:
    """Runs of so many words as numbers.

    Args:
        words: of any documents.
        length: how many words make a shingle, at least 1.
    """
    hash_W, begin_D1 = words
    n_words_D = np.diff(begin_D1)
    factors = _draws("shingles", length)
    hash_S = hash_W * factors[0]
    for place in range(1, length):
        hash_S[:-place] += hash_W[place:] * factors[place]
    short_D = np.flatnonzero((n_words_D > 0) & (n_words_D < length))
    whole = np.ones(len(hash_W), np.bool_)
    for place in range(1, length):
        ends = begin_D1[1:] - place
        whole[ends[ends >= begin_D1[:-1]]] = False
    first = begin_D1[short_D]
    hash_S[first] = 0
    for place in range(length - 1):
        has = n_words_D[short_D] > place
        hash_S[first[has]] += hash_W[first[has] + place] * factors[place]
    whole[first] = True
    counts_D = np.where(n_words_D >= length, n_words_D - length + 1, (n_words_D > 0).astype(np.int64))
    return Shingles(mix(hash_S[whole]), np.concatenate([[0], np.cumsum(counts_D)]))


def sequence_hashes(words: Words) -> UInt64Array:
    """One number [D] for each document's sequence of words: equal for equal sequences."""
    hash_W, begin_D1 = words
    n_words_D = np.diff(begin_D1)
    place_W = np.arange(len(hash_W), dtype=np.uint64) - np.repeat(begin_D1[:-1], n_words_D).astype(np.uint64)
    place_W *= np.uint64(2 * int(_draws("sequence", 1)[0]) + 2)  # any even factor: all multiples are even
    place_W += np.uint64(1)
    place_W *= hash_W
    running_W1 = np.zeros(len(hash_W) + 1, np.uint64)
    np.cumsum(mix(place_W), out=running_W1[1:])
    return mix(np.diff(running_W1[begin_D1]) + n_words_D.astype(np.uint64))


class Permutations(NamedTuple):
    """Random permutations of the 32-bit numbers, in bands."""

    factor_P: UInt32Array
    shift_P: UInt32Array
    rows: int
    """Permutations in a band."""

    @classmethod
    def draw(cls, bands: int, rows: int, seed: int) -> Permutations:
        """So many bands of so many rows; one seed gives the same on every machine."""
        drawn = _draws(f"permutations {seed}", 2 * bands * rows)
        factor_P = (drawn[: bands * rows] >> np.uint64(32)).astype(np.uint32) | np.uint32(1)
        return cls(factor_P, (drawn[bands * rows :] >> np.uint64(32)).astype(np.uint32), rows)


def minima(given: Shingles, permutations: Permutations) -> UInt32Array:
    """The least permuted shingle of each document: [P, D]; the largest number where there is none."""
    n_documents = len(given.begin_D1) - 1
    minimum_PD = np.full((len(permutations.factor_P), n_documents), 2**32 - 1, np.uint32)
    filled_D = np.flatnonzero(np.diff(given.begin_D1))
    if not filled_D.size:
        return minimum_PD
    half_S = (given.hash_S >> np.uint64(32)).astype(np.uint32)
    begin_F = given.begin_D1[filled_D]
    permuted_S = np.empty_like(half_S)
    for row, (factor, shift) in enumerate(zip(permutations.factor_P, permutations.shift_P, strict=True)):
        np.multiply(half_S, factor, out=permuted_S)
        np.add(permuted_S, shift, out=permuted_S)
        minimum_PD[row, filled_D] = np.minimum.reduceat(permuted_S, begin_F)
    return minimum_PD


def band_keys(given: Shingles, permutations: Permutations) -> UInt64Array:
    """For each document and band one number [D, B]: documents that share one are candidates."""
    minimum_PD = minima(given, permutations)
    bands = len(minimum_PD) // permutations.rows
    minimum_BRD = minimum_PD.reshape(bands, permutations.rows, -1)
    factors = _draws("bands", permutations.rows)
    key_BD = minimum_BRD[:, 0].astype(np.uint64) * factors[0]
    for row in range(1, permutations.rows):
        key_BD += minimum_BRD[:, row].astype(np.uint64) * factors[row]
    return np.ascontiguousarray(mix(key_BD).T)


def _draws(purpose: str, count: int) -> UInt64Array:
    """Odd 64-bit numbers, the same for a purpose on every machine and with every version of numpy."""
    start = int.from_bytes(purpose.encode(), "little") % (2**64 - 59)
    number = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E37_79B9_7F4A_7C15) + np.uint64(start)
    return mix(mix(number)) | np.uint64(1)
