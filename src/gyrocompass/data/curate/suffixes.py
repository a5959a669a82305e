"""Copies among texts, by the sorted order of all their suffixes; see `repeated_passages` for what counts as
one.

`pydivsufsort` sorts (Mori's divsufsort) and measures how much neighbours have in common (Kasai et al. 2001).
It compares bytes; what is asked for and what is given back is counted in characters. A character of UTF-8
begins with a byte that no other byte of a character can be, so equal bytes from the start of a character on
are equal characters.

Shape legend: N bytes, C characters (a separator counts as one), M copies, S spans.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from gyrocompass.core.errors import MissingDependency
from gyrocompass.data.curate.words import Int64Array, byte_view

SEPARATOR = 0xFF
"""No byte of UTF-8."""

_NEVER = 2**31 - 1


class Copies(NamedTuple):
    """Spans, ascending by document and start."""

    document_S: Int64Array
    start_S: Int64Array
    """In characters of the document."""
    end_S: Int64Array
    source_S: Int64Array
    """The document in which the first `minimum` characters of the span stand for the first time."""


def find_copies(texts: pa.Array, minimum: int) -> Copies:
    """All stretches of at least so many characters that stand earlier, in this text or one before it.

    Args:
        texts: large_string.
        minimum: characters.

    Raises:
        MissingDependency: `pydivsufsort` is not installed.
    """
    byte_N, begin_D = _joined(texts)
    char_C = np.flatnonzero((byte_N & 0xC0) != 0x80)
    need_N = _bytes_needed(byte_N, char_C, minimum)
    place_M, source_M = _later(byte_N, need_N)
    end_M = place_M + need_N[place_M]
    fresh = np.ones(len(place_M), np.bool_)
    fresh[1:] = place_M[1:] > np.maximum.accumulate(end_M)[:-1]
    begin_S = np.flatnonzero(fresh)
    start_S = place_M[begin_S]
    end_S = np.maximum.reduceat(end_M, begin_S) if len(begin_S) else end_M
    document_S = np.searchsorted(begin_D, start_S, side="right") - 1
    base_S = np.searchsorted(char_C, begin_D[document_S])
    return Copies(
        document_S,
        np.searchsorted(char_C, start_S) - base_S,
        np.searchsorted(char_C, end_S) - base_S,
        np.searchsorted(begin_D, source_M[begin_S], side="right") - 1,
    )


def _joined(texts: pa.Array) -> tuple[npt.NDArray[np.uint8], Int64Array]:
    """The bytes of all texts with a separator after each, and where each begins."""
    given_N, begin_D1 = byte_view(texts)
    begin_D = begin_D1[:-1] + np.arange(len(texts))
    byte_N = np.full(len(given_N) + len(texts), SEPARATOR, np.uint8)
    inside = np.ones(len(byte_N), np.bool_)
    inside[begin_D1[1:] + np.arange(len(texts))] = False
    byte_N[inside] = given_N
    return byte_N, begin_D


def _bytes_needed(byte_N: npt.NDArray[np.uint8], char_C: Int64Array, minimum: int) -> npt.NDArray[np.int32]:
    """How many bytes the next `minimum` characters have; more than there are, where a text ends before."""
    need_N = np.full(len(byte_N), _NEVER, np.int32)
    if len(char_C) <= minimum:
        return need_N
    ended_C = np.cumsum(byte_N[char_C] == SEPARATOR)
    first = np.arange(len(char_C) - minimum)
    # All before the window's last character, and it itself, lie in the text of the first.
    whole = (ended_C[first + minimum - 1] == ended_C[first]) & (byte_N[char_C[first]] != SEPARATOR)
    need_N[char_C[first[whole]]] = char_C[first[whole] + minimum] - char_C[first[whole]]
    return need_N


def _later(byte_N: npt.NDArray[np.uint8], need_N: npt.NDArray[np.int32]) -> tuple[Int64Array, Int64Array]:
    """Where `minimum` characters stand that stood earlier, ascending, and where each stood first."""
    if not (need_N < _NEVER).any():
        return np.empty(0, np.int64), np.empty(0, np.int64)
    try:
        import pydivsufsort
    except ImportError as error:
        raise MissingDependency(
            "pydivsufsort", extra="substrings", needed_for="finding repeated passages"
        ) from error
    place_N = pydivsufsort.divsufsort(byte_N)
    common_N = pydivsufsort.kasai(byte_N, place_N)[:-1]  # of each with the next one
    joined_N = common_N >= need_N[place_N[1:]]
    del common_N
    # Runs of joined neighbours: a member is joined with the one before it or the one after it.
    member = np.zeros(len(place_N), np.bool_)
    member[1:] |= joined_N
    member[:-1] |= joined_N
    rank_M = np.flatnonzero(member)
    place_M = place_N[rank_M].astype(np.int64)
    begins = np.ones(len(rank_M), np.bool_)
    begins[1:] = ~joined_N[rank_M[1:] - 1]
    first_G = np.minimum.reduceat(place_M, np.flatnonzero(begins)) if len(rank_M) else place_M
    first_M = first_G[np.cumsum(begins) - 1] if len(rank_M) else place_M
    apart = place_M >= first_M + need_N[place_M]
    order = np.argsort(place_M[apart], kind="stable")
    return place_M[apart][order], first_M[apart][order]
