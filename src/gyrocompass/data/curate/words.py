r"""Words as numbers: the text of many documents becomes one array of 64-bit word hashes.

    texts --blocks--> texts, texts, ...        whole documents, about as much as a cache holds
    texts --word_hashes--> Words               hash_W, and where each document's words begin

A word is what `\w+` finds in the lower-cased text, except that a character of a script that is written
without spaces (Chinese, Japanese, Thai, ...) is a word by itself. With character codes c_j and an odd base b,
the hash of a word that begins at i is mixed from

    sum over its characters of c_j * b^(j - i)   mod 2^64,

which for all words of a block are differences of one running sum: no loop over words in Python. Blocks of
ASCII are read as the bytes they are; any other block as code points.

Equal words have equal hashes in every block and on every machine. Different words have different hashes
except by accident (2^-64 for a pair), or by the design of somebody who knows the base: this is no
cryptographic hash.

Shape legend: D documents, W words, N characters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from gyrocompass.core.errors import BadInput
from gyrocompass.data.curate.columns import string_column

UInt64Array = npt.NDArray[np.uint64]
Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

BLOCK_BYTES = 2**18
_MOST_CHARACTERS = 2**18

_BASE = 0x9E6C_63D0_876A_3F6B
_INVERSE = pow(_BASE, -1, 2**64)

SPACELESS = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x3040, 0x30FF),  # kana
    (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF),  # Chinese characters
)  # fmt: skip
"""Code points of scripts written without spaces between words, both ends included."""

_LAST_LETTER = 0x3FFFF
"""Nothing above is a word character: private use, tags and variation selectors."""


class Words(NamedTuple):
    """The words of some documents, one after another."""

    hash_W: UInt64Array
    begin_D1: Int64Array
    """Document d has the words begin_D1[d] to begin_D1[d + 1]."""


def text_array(texts: Sequence[str] | pa.Array | pa.ChunkedArray) -> pa.Array:
    """Texts as one Arrow array of type large_string.

    Raises:
        BadInput: a text cannot be written as UTF-8, or is null.
    """
    if isinstance(texts, pa.ChunkedArray):
        texts = texts.combine_chunks()
    if not isinstance(texts, pa.Array):
        texts = string_column(texts)
    if texts.null_count:
        row = pc.index(pc.is_null(texts), True).as_py()
        raise BadInput(
            "a document has no text", where=f"row {row}", fix="leave it out, or give an empty text"
        )
    return texts if pa.types.is_large_string(texts.type) else texts.cast(pa.large_string())


def byte_view(texts: pa.Array) -> tuple[npt.NDArray[np.uint8], Int64Array]:
    """The UTF-8 bytes of a large_string array and where each text begins in them, without a copy.

    Returns:
        bytes [N], and offsets [D + 1] whose first is 0.
    """
    _, offsets, data = texts.buffers()
    if len(texts) == 0 or data is None:
        return np.empty(0, np.uint8), np.zeros(len(texts) + 1, np.int64)
    begin_D1 = np.frombuffer(offsets, np.int64, len(texts) + 1, texts.offset * 8)
    first, last = int(begin_D1[0]), int(begin_D1[-1])
    return np.frombuffer(data, np.uint8)[first:last], begin_D1 - first


def blocks(texts: pa.Array, block_bytes: int = BLOCK_BYTES) -> Iterator[pa.Array]:
    """The texts in order, in slices of about so many bytes, at least one document each."""
    _, begin_D1 = byte_view(texts)
    start = 0
    while start < len(texts):
        stop = int(np.searchsorted(begin_D1, begin_D1[start] + block_bytes, side="right")) - 1
        stop = max(stop, start + 1)
        yield texts.slice(start, stop - start)
        start = stop


def word_hashes(texts: pa.Array) -> Words:
    """The words of some documents; a large array is better given in `blocks`.

    Args:
        texts: large_string without nulls.

    >>> words = word_hashes(text_array(["One, two!", "TWO one 東京"]))
    >>> words.begin_D1.tolist(), bool((words.hash_W[:2] == words.hash_W[[3, 2]]).all())
    ([0, 2, 6], True)
    """
    byte_N, begin_D1 = byte_view(texts)
    if not byte_N.size:
        return Words(np.empty(0, np.uint64), np.zeros(len(texts) + 1, np.int64))
    if byte_N.max() < 0x80:
        folded_N = np.frombuffer(byte_N.tobytes().translate(_ascii_fold()), np.uint8)
        return _words(folded_N, None, begin_D1)
    lowered = [text.lower() for text in texts.to_pylist()]
    begin_D1 = np.cumsum([0, *map(len, lowered)], dtype=np.int64)
    code_N = np.frombuffer("".join(lowered).encode("utf-32-le"), np.uint32)
    low_N = np.minimum(code_N, _LAST_LETTER + 1)
    kind_N = _kinds()[low_N]
    return _words(np.where(kind_N > 0, code_N, 0), kind_N == 2, begin_D1)


def mix(value: UInt64Array) -> UInt64Array:
    """Spread every bit of each number over all of it, in place; one to one."""
    value ^= value >> np.uint64(32)
    value *= np.uint64(0xD6E8_FEB8_6659_FD93)
    value ^= value >> np.uint64(32)
    return value


def _words(
    folded_N: npt.NDArray[np.unsignedinteger], alone_N: BoolArray | None, begin_D1: Int64Array
) -> Words:
    """Words from characters.

    Args:
        folded_N: lower-cased character codes; 0 where no word is.
        alone_N: characters that are words by themselves, or None.
        begin_D1: where documents begin.
    """
    inside_N = folded_N != 0
    starts_N = inside_N.copy()
    starts_N[1:] &= ~inside_N[:-1]
    if alone_N is not None:
        starts_N |= alone_N
        starts_N[1:] |= alone_N[:-1] & inside_N[1:]
    edge = begin_D1[:-1][begin_D1[:-1] < folded_N.size]
    starts_N[edge] = inside_N[edge]
    start_W = np.flatnonzero(starts_N)
    hashes, first = [np.empty(0, np.uint64)], 0
    while first < len(start_W):  # as many words at once as a block has room for: a document may be huge
        last = max(first + 1, int(np.searchsorted(start_W, start_W[first] + _MOST_CHARACTERS)))
        begin = int(start_W[first])
        end = int(start_W[last]) if last < len(start_W) else folded_N.size
        hashes.append(_sums(folded_N[begin:end], start_W[first:last] - begin))
        first = last
    return Words(mix(np.concatenate(hashes)), np.searchsorted(start_W, begin_D1))


def _sums(folded_N: npt.NDArray[np.unsignedinteger], start_W: Int64Array) -> UInt64Array:
    """The sum of each word, from its start to the next one's."""
    power_N, inverse_N = powers(folded_N.size)
    running_N1 = np.zeros(folded_N.size + 1, np.uint64)
    term_N = folded_N.astype(np.uint64)
    term_N *= power_N[: folded_N.size]
    np.cumsum(term_N, out=running_N1[1:])
    sum_W: UInt64Array = np.diff(running_N1[np.append(start_W, folded_N.size)])
    sum_W *= inverse_N[start_W]
    return sum_W


def powers(size: int) -> tuple[UInt64Array, UInt64Array]:
    """The base's powers 0, 1, ... and their inverses mod 2^64, at least so many."""
    return _kept_powers() if size <= 2 * _MOST_CHARACTERS else _powers_of(size)


@cache
def _kept_powers() -> tuple[UInt64Array, UInt64Array]:
    """For all but one huge word."""
    return _powers_of(2 * _MOST_CHARACTERS)


def _powers_of(size: int) -> tuple[UInt64Array, UInt64Array]:
    tables = []
    for base in (_BASE, _INVERSE):
        table = np.full(size, base, np.uint64)
        table[0] = 1
        tables.append(np.multiply.accumulate(table))
    return tables[0], tables[1]


@cache
def _ascii_fold() -> bytes:
    """For each byte, the lower-case letter, digit or underscore that it is, or 0."""
    letters = (chr(code).lower() if chr(code).isalnum() or chr(code) == "_" else "\0" for code in range(128))
    return "".join(letters).encode() + bytes(128)


@cache
def _kinds() -> npt.NDArray[np.uint8]:
    r"""For each code point up to the last letter: 0 no word, 1 `\w`, 2 a word by itself."""
    kinds = np.fromiter((chr(code).isalnum() for code in range(_LAST_LETTER + 2)), np.uint8, _LAST_LETTER + 2)
    kinds[ord("_")] = 1
    for low, high in SPACELESS:
        kinds[low : high + 1] *= 2
    return kinds
