"""Quality of texts by rules that can be counted: the figures, and which rules of its slice a document breaks.

    text --Quality--> n_words, mean_word_length, ..., broken ["short_lines", ...], passes

The rules for prose are those of Gopher (Rae et al. 2021, table A1) and FineWeb (Penedo et al. 2024): they
keep fewer than one in five files of code or manuals, so that each kind of text has rules of its own. Those
for code are StarCoder's (Li et al. 2023). Which set a document takes is decided by its slice, as with the
thresholds of rules: the slice's own name, else the longest name that it is a part of (`code` of
`code/tests`), else `*`. Figures are always given, so that rules can change later.

Stop words are counted in the document's language if a list of it is known, else in English.

Left out: quality by a trained classifier, which is a matter of `likelihood`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from gyrocompass.core.config import Config
from gyrocompass.core.errors import did_you_mean
from gyrocompass.data.curate.blocks import by_blocks
from gyrocompass.data.curate.joined import Flags, Int64Array, Joined, is_any
from gyrocompass.data.curate.rules import ANY_SLICE
from gyrocompass.data.curate.step import RecordStep, register
from gyrocompass.data.curate.text_shape import Float64Array, TextShape, ratio
from gyrocompass.data.curate.word_runs import Hashes, WordRuns, hash_words

STOP_WORDS = {
    "en": "the be to of and that have with",
    "de": "der die und in den von zu das mit sich",
    "fr": "de la le et les des en un une que",
    "es": "de la que el en y los se del las",
    "it": "di che la il un per in una sono mi",
    "pt": "de que o a do da em um para com",
    "nl": "de en van ik te dat die in een hij",
    "sv": "och det att i en jag hon som han på",
    "pl": "w i na z do się nie że to jest",
}
"""Words that running text of a language can hardly do without."""

FIGURES = (
    "n_words", "n_lines", "mean_word_length", "symbol_word_ratio", "bullet_lines", "ellipsis_lines",
    "letter_words", "stop_words", "terminal_lines", "short_lines", "newline_word_ratio", "mean_line_length",
    "longest_line", "alphanumeric", "uppercase", "digits", "longest_word",
)  # fmt: skip
"""What is counted: shares are of lines, words or characters, lengths in characters."""

_BULLETS = "*-+\xb7"
_TERMINAL = ".!?\"'\xbb)"


class Bounds(Config):
    """From where to where a figure may go; None: no limit."""

    least: float | None = None
    most: float | None = None


PROSE = {
    "n_words": Bounds(least=50, most=100_000),
    "mean_word_length": Bounds(least=3, most=10),
    "symbol_word_ratio": Bounds(most=0.1),
    "bullet_lines": Bounds(most=0.9),
    "ellipsis_lines": Bounds(most=0.3),
    "letter_words": Bounds(least=0.8),
    "stop_words": Bounds(least=2),
    "terminal_lines": Bounds(least=0.12),
    "short_lines": Bounds(most=0.67),
    "newline_word_ratio": Bounds(most=0.3),
}
"""Gopher's and FineWeb's."""

CODE = {
    "n_words": Bounds(least=5),
    "mean_line_length": Bounds(most=100),
    "longest_line": Bounds(most=1000),
    "alphanumeric": Bounds(least=0.25),
    "longest_word": Bounds(most=500),
}
"""StarCoder's, and no word longer than code has."""

CHAT = {
    "n_words": Bounds(least=2),
    "mean_word_length": Bounds(least=2, most=15),
    "symbol_word_ratio": Bounds(most=0.3),
}
"""Short turns are good turns."""


@register
class Quality(RecordStep):
    """Counts what rules of quality read.

    Args:
        rules: for each slice, or what its name begins with up to a slash, the bounds of its figures; `*` is
            for all others.
    """

    name: ClassVar[str] = "quality"

    rules: dict[str, dict[str, Bounds]] = Field(
        default_factory=lambda: {"*": PROSE, "code": CODE, "chat": CHAT, "pair": CHAT}
    )

    @model_validator(mode="after")
    def _figures_are_known(self) -> Quality:
        for slice_name, bounds in self.rules.items():
            for figure in bounds:
                if figure not in FIGURES:
                    raise ValueError(
                        f"rules of {slice_name!r}: no figure {figure!r}{did_you_mean(figure, FIGURES)}"
                    )
        return self

    def annotate(self, documents: pa.RecordBatch) -> pa.RecordBatch:
        """The figures, `broken` (names of rules) and `passes`."""
        return by_blocks(documents, self._annotate)

    def _annotate(self, documents: pa.RecordBatch) -> pa.RecordBatch:
        joined = Joined.of(documents)
        figures = measure(joined, documents.column("language").to_pylist())
        slices = documents.column("slice").to_pylist()
        broken: list[list[str]] = [[] for _ in slices]
        for name in sorted(set(slices)):
            rows = np.array([slice_name == name for slice_name in slices])
            for figure, bounds in self.bounds_of(name).items():
                for row in np.flatnonzero(rows & _outside(figures[figure], bounds)).tolist():
                    broken[row].append(figure)
        return pa.RecordBatch.from_pydict(
            {"id": documents.column("id")}
            | {name: pa.array(figures[name], pa.float32()) for name in FIGURES}
            | {"broken": pa.array(broken, pa.list_(pa.string()))}
            | {"passes": pa.array([not names for names in broken], pa.bool_())}
        )

    def bounds_of(self, slice_name: str) -> Mapping[str, Bounds]:
        """The rules of a slice; none where no name fits."""
        fitting = [
            name for name in self.rules if name == ANY_SLICE or f"{slice_name}/".startswith(f"{name}/")
        ]
        best = max(fitting, key=lambda name: (name != ANY_SLICE, len(name)), default=None)
        return {} if best is None else self.rules[best]


def _outside(figure_D: Float64Array, bounds: Bounds) -> Flags:
    outside = np.zeros(len(figure_D), np.bool_)
    if bounds.least is not None:
        outside |= figure_D < bounds.least
    if bounds.most is not None:
        outside |= figure_D > bounds.most
    return outside


def measure(joined: Joined, languages: list[str | None]) -> dict[str, Float64Array]:
    """The figures of each document."""
    shape = TextShape(joined)
    code_N = joined.code_N
    n_words, n_lines = shape.n_words_D, shape.n_lines_D
    length_L = shape.end_L - shape.start_L
    last_L = code_N[shape.end_L - 1] if len(shape.end_L) else code_N[:0]
    ends = is_any(last_L, _TERMINAL) | _is_text(joined, shape.end_L - 1, "。！？”’…»")
    is_ellipsis = _is_text(joined, shape.end_L - 1, "…")
    dot_N = np.concatenate([[False] * 2, code_N == ord(".")])
    three_N = dot_N[2:] & dot_N[1:-1] & dot_N[:-2]
    is_ellipsis |= (length_L >= 3) & three_N[shape.end_L - 1]
    bullets = (
        is_any(code_N[shape.start_L], _BULLETS) & (shape.length_W[shape.first_word_L] == 1)
    ) | _is_text(joined, shape.start_L, "•‣◦▪")
    upper_N = (code_N - 65 < 26) | ((code_N >= 0xC0) & (code_N <= 0xDE) & (code_N != 0xD7))
    digit_N = code_N - 48 < 10
    letters_W = shape.any_in_words(shape.letter_N & ~digit_N)
    n_ellipses = shape.count_characters(_all_text(joined, "…")) + _count(joined, "...")
    n_hashes = shape.count_characters(code_N == ord("#"))
    by_line = shape.per_document
    return {
        "n_words": n_words.astype(np.float64),
        "n_lines": n_lines.astype(np.float64),
        "mean_word_length": ratio(by_line(shape.row_W, shape.length_W), n_words),
        "symbol_word_ratio": ratio(np.maximum(n_hashes, n_ellipses), n_words),
        "bullet_lines": ratio(by_line(shape.row_L, bullets), n_lines),
        "ellipsis_lines": ratio(by_line(shape.row_L, is_ellipsis), n_lines),
        "letter_words": ratio(by_line(shape.row_W, letters_W), n_words),
        "stop_words": _stop_words(joined, languages),
        "terminal_lines": ratio(by_line(shape.row_L, ends), n_lines),
        "short_lines": ratio(by_line(shape.row_L, length_L <= 30), n_lines),
        "newline_word_ratio": ratio(shape.count_characters(code_N == 10), n_words),
        "mean_line_length": ratio(by_line(shape.row_L, length_L), n_lines),
        "longest_line": _longest(shape.row_L, length_L, len(n_words)),
        "alphanumeric": ratio(shape.count_characters(shape.letter_N), joined.length_D),
        "uppercase": ratio(shape.count_characters(upper_N), joined.length_D),
        "digits": ratio(shape.count_characters(digit_N), joined.length_D),
        "longest_word": _longest(shape.row_W, shape.length_W, len(n_words)),
    }


def _longest(rows: Int64Array, lengths: Int64Array, n: int) -> Float64Array:
    longest = np.zeros(n, np.int64)
    np.maximum.at(longest, rows, lengths)
    return longest.astype(np.float64)


def _all_text(joined: Joined, characters: str) -> Flags:
    """Whether each character is one of some that Latin-1 does not have."""
    if joined.text.isascii():
        return np.zeros(len(joined.code_N), np.bool_)
    return np.isin(joined.point_N, [ord(character) for character in characters])


def _is_text(joined: Joined, positions: Int64Array, characters: str) -> Flags:
    """The same at some positions."""
    if joined.text.isascii():
        return np.zeros(len(positions), np.bool_)
    return np.isin(joined.point_N[positions], [ord(character) for character in characters])


def _count(joined: Joined, part: str) -> Float64Array:
    return np.array([text.count(part) for text in joined.texts], np.float64)


@cache
def _stop_hashes(language: str) -> Hashes:
    return np.array([hash_words(word) for word in STOP_WORDS[language].split()], np.uint64)


def _stop_words(joined: Joined, languages: list[str | None]) -> Float64Array:
    """How many different stop words of its language each document has."""
    words = WordRuns(joined)
    first_G, hash_G = words.ngram_hashes(1)
    known = np.array([language if language in STOP_WORDS else "en" for language in languages], dtype=object)
    counts = np.zeros(len(languages), np.float64)
    is_short = words.length_W[first_G] <= max(
        len(word) for listed in STOP_WORDS.values() for word in listed.split()
    )
    row_G, hash_G = words.row_W[first_G][is_short], hash_G[is_short]
    for language in sorted(set(known)):
        for stop in _stop_hashes(language):
            present = np.bincount(row_G[hash_G == stop], minlength=len(languages)) > 0
            counts += present & (known == language)
    return counts
