"""Repetition within a document: lines, paragraphs and runs of words that occur again.

    text --Repetition--> duplicate_lines, duplicate_line_characters, ..., top_2gram, ..., duplicate_10gram

The figures of Gopher (Rae et al. 2021, table A1), each a share from 0 to 1:

    duplicate_lines, duplicate_paragraphs            of lines, paragraphs: those that stood there before
    duplicate_line_characters, ..._paragraph_...     the same, of characters
    top_Ngram                                        of characters of words: in the most frequent run of N
    duplicate_Ngram                                  of characters of words: in runs of N that stood before

Gopher's limits are .3, .3, .2, .2; .20, .18, .16 for N = 2, 3, 4; .15 falling to .10 for N = 5 to 10. Code
repeats itself honestly (imports, braces), so limits are set for each slice by the rules that read these.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pyarrow as pa
from pydantic import PositiveInt

from gyrocompass.data.curate.blocks import by_blocks
from gyrocompass.data.curate.joined import Flags, Int64Array, Joined
from gyrocompass.data.curate.step import RecordStep, register
from gyrocompass.data.curate.text_shape import Float64Array, TextShape, ratio
from gyrocompass.data.curate.word_runs import Hashes, WordRuns, mix, prefix_hashes, range_hashes

_BUCKET_BITS = 18


@register
class Repetition(RecordStep):
    """Measures how much of a document repeats itself.

    Args:
        top: lengths in words of runs whose most frequent one is measured.
        duplicate: lengths in words of runs that occur again.
    """

    name: ClassVar[str] = "repetition"

    top: tuple[PositiveInt, ...] = (2, 3, 4)
    duplicate: tuple[PositiveInt, ...] = (5, 10)

    def annotate(self, documents: pa.RecordBatch) -> pa.RecordBatch:
        """The figures, as shares."""
        return by_blocks(documents, self._annotate)

    def _annotate(self, documents: pa.RecordBatch) -> pa.RecordBatch:
        joined = Joined.of(documents)
        figures = self._lines(joined)
        words = WordRuns(joined)
        n_characters = np.bincount(words.row_W, words.length_W, len(joined.texts))
        for n in self.top:
            figures[f"top_{n}gram"] = ratio(_top(words, n), n_characters)
        for n in self.duplicate:
            figures[f"duplicate_{n}gram"] = ratio(_again(words, n), n_characters)
        return pa.RecordBatch.from_pydict(
            {"id": documents.column("id")} | {name: pa.array(x, pa.float32()) for name, x in figures.items()}
        )

    def _lines(self, joined: Joined) -> dict[str, Float64Array]:
        shape = TextShape(joined)
        prefix = prefix_hashes(joined.code_N if joined.text.isascii() else joined.point_N)
        newlines = np.concatenate([[0], np.cumsum(joined.code_N == 10)])
        gap_L = newlines[shape.start_L[1:]] - newlines[shape.end_L[:-1]]
        begins_L = np.ones(len(shape.start_L), np.bool_)
        begins_L[1:] = (gap_L > 1) | (shape.row_L[1:] != shape.row_L[:-1])
        first_P = np.flatnonzero(begins_L)
        last_P = np.append(first_P[1:], len(shape.start_L))[: len(first_P)] - 1
        figures = {}
        for name, start, end in (
            ("line", shape.start_L, shape.end_L),
            ("paragraph", shape.start_L[first_P], shape.end_L[last_P]),
        ):
            row = joined.rows_of(start)
            is_again = _is_again(row, range_hashes(prefix, start, end))
            length = end - start
            counts = [
                np.bincount(row, weights, len(joined.texts))
                for weights in (is_again, None, length * is_again, length)
            ]
            figures[f"duplicate_{name}s"] = ratio(counts[0], counts[1])
            figures[f"duplicate_{name}_characters"] = ratio(counts[2], counts[3])
        return figures


def _key(row: Int64Array, hashes: Hashes) -> Hashes:
    """A hash of each hash together with its document."""
    return mix(hashes ^ mix(row.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)))


def _repeated(key: Hashes) -> tuple[Int64Array, Int64Array]:
    """Where the keys that occur more than once stand, sorted by key, and where each key begins among them.

    A count of keys by some of their bits leaves out nearly all that occur once, before anything is sorted.
    """
    bucket = key & np.uint64((1 << _BUCKET_BITS) - 1)
    crowded = np.flatnonzero(np.bincount(bucket.view(np.int64), minlength=1 << _BUCKET_BITS)[bucket] > 1)
    order = crowded[np.argsort(key[crowded])]
    is_begin = np.ones(len(order), np.bool_)
    is_begin[1:] = key[order[1:]] != key[order[:-1]]
    is_single = is_begin & np.append(is_begin[1:], True)
    return order[~is_single], np.flatnonzero(is_begin[~is_single])


def _is_again(row: Int64Array, hashes: Hashes) -> Flags:
    """Whether each stood before in its document."""
    again = np.zeros(len(hashes), np.bool_)
    order, begins = _repeated(_key(row, hashes))
    again[order] = True
    if len(begins):
        again[np.minimum.reduceat(order, begins)] = False
    return again


def _top(words: WordRuns, n: int) -> Float64Array:
    """Characters of each document in its most frequent run of n words; 0 where none occurs twice.

    Of runs that are equally frequent the one with the most characters counts.
    """
    first_G, hash_G = words.ngram_hashes(n)
    row_G = words.row_W[first_G]
    order, begins = _repeated(_key(row_G, hash_G))
    count = np.diff(np.append(begins, len(order)))
    one = order[begins]
    sums = np.concatenate([[0], np.cumsum(words.length_W)])
    length = sums[first_G[one] + n] - sums[first_G[one]]
    best = np.zeros(len(words.joined.texts), np.int64)
    np.maximum.at(best, row_G[one], count * (1 << 32) + length)
    return ((best >> 32) * (best & 0xFFFFFFFF)).astype(np.float64)


def _again(words: WordRuns, n: int) -> Float64Array:
    """Characters of each document in runs of n words that stood there before, each character once."""
    first_G, hash_G = words.ngram_hashes(n)
    again = first_G[_is_again(words.row_W[first_G], hash_G)]
    change = np.zeros(len(words.start_W) + 1, np.int64)
    np.add.at(change, again, 1)
    np.add.at(change, again + n, -1)
    is_covered = np.cumsum(change)[:-1] > 0
    covered_W = words.length_W * is_covered
    return np.asarray(np.bincount(words.row_W, covered_W, len(words.joined.texts)), np.float64)
