"""Moderation: words, patterns and scorers that say what a text holds which some uses do not want.

    text --Moderation--> spans [(start, end, "slurs", 1.0), ...], per_1000 of each list, score of each scorer

A list is words and phrases (found as whole words, in any case and layout), patterns, and the word lists of
installed packages; the figure of a list is its hits for each 1000 words, so that a novel and a note compare.
What is too much differs by slice and is for the rules to say: a glossary of insults is no insult.

A scorer is a program of its own: whatever is registered in `SCORERS` gives one number for each text. None
comes with this package: alt-profanity-check, the one that ships its model, keeps it as a pickle, and nothing
here reads pickles. Extra `moderation` brings the list of better-profanity, which is plain text.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field, field_validator

from gyrocompass.core.config import Config
from gyrocompass.core.errors import BadInput, MissingDependency, did_you_mean
from gyrocompass.data.curate.blocks import by_blocks
from gyrocompass.data.curate.joined import Joined
from gyrocompass.data.curate.spans import Span, by_document, to_arrow
from gyrocompass.data.curate.step import RecordStep, register
from gyrocompass.data.curate.text_shape import ratio
from gyrocompass.data.curate.word_runs import Hashes, WordRuns, hash_words, word_list

TextScorer = Callable[[Sequence[str]], Sequence[float]]
"""One number for each text; higher is worse."""

SCORERS: dict[str, Callable[[], TextScorer]] = {}
"""Makers of scorers by name; a plug-in adds its own."""

PACKAGES = {"better_profanity": "profanity_wordlist.txt"}
"""Packages that bring a word list, and the file that holds it, one entry a line."""


class TermList(Config):
    """What a list looks for.

    Args:
        words: words and phrases.
        patterns: regular expressions; they see one document at a time.
        package: one of `PACKAGES`, whose words are added.
    """

    words: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()
    package: str | None = None

    @field_validator("words")
    @classmethod
    def _words_have_letters(cls, words: tuple[str, ...]) -> tuple[str, ...]:
        for word in words:
            if not word_list(word):
                raise ValueError(f"{word!r} has no letter or digit, so that it is never found as a word")
        return words

    @field_validator("patterns")
    @classmethod
    def _patterns_compile(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            try:
                is_empty = re.compile(pattern).fullmatch("") is not None
            except re.error as error:
                raise ValueError(f"not a regular expression: {pattern!r}: {error}") from None
            if is_empty:
                raise ValueError(f"matches nothing at all, and so everywhere: {pattern!r}")
        return patterns

    @field_validator("package")
    @classmethod
    def _package_is_known(cls, package: str | None) -> str | None:
        if package is not None and package not in PACKAGES:
            raise ValueError(f"no word list of {package!r} is known{did_you_mean(package, PACKAGES)}")
        return package

    def all_words(self) -> tuple[str, ...]:
        """Its words and its package's.

        Raises:
            MissingDependency: the package is not installed.
        """
        return self.words + (_package_words(self.package) if self.package else ())


@register
class Moderation(RecordStep):
    """Finds terms and asks scorers.

    Args:
        lists: by name; the name is the kind of the spans.
        scorers: names in `SCORERS`.
    """

    name: ClassVar[str] = "moderation"

    lists: dict[str, TermList] = Field(default_factory=dict)
    scorers: tuple[str, ...] = ()

    def annotate(self, documents: pa.RecordBatch) -> pa.RecordBatch:
        """`spans`, `per_1000_<list>` of each list and `score_<scorer>` of each scorer.

        Raises:
            BadInput: no scorer has that name.
            MissingDependency: the package of a list is not installed.
        """
        return by_blocks(documents, self._annotate)

    def _annotate(self, documents: pa.RecordBatch) -> pa.RecordBatch:
        joined = Joined.of(documents)
        words = WordRuns(joined)
        spans = by_document(joined, [span for name in self.lists for span in self._find(name, words)])
        columns: dict[str, pa.Array] = {"id": documents.column("id"), "spans": to_arrow(spans)}
        for name in self.lists:
            counts = np.array([sum(span.kind == name for span in found) for found in spans], np.float64)
            columns[f"per_1000_{name}"] = pa.array(1000 * ratio(counts, words.n_words_D), pa.float32())
        for name in self.scorers:
            columns[f"score_{name}"] = pa.array(scorer(name)(joined.texts), pa.float32())
        return pa.RecordBatch.from_pydict(columns)

    def _find(self, name: str, words: WordRuns) -> Iterator[Span]:
        joined = words.joined
        for n, hashes in _hashed(self.lists[name].all_words()):
            first_G, hash_G = words.ngram_hashes(n)
            for first in first_G[np.isin(hash_G, hashes)].tolist():
                yield Span(int(words.start_W[first]), int(words.end_W[first + n - 1]), name, 1.0)
        for pattern in self.lists[name].patterns:
            for text, offset in zip(joined.texts, joined.start_D.tolist(), strict=True):
                for match in re.compile(pattern).finditer(text):
                    if match.end() > match.start():
                        yield Span(offset + match.start(), offset + match.end(), name, 1.0)


@lru_cache(maxsize=64)
def _hashed(terms: tuple[str, ...]) -> tuple[tuple[int, Hashes], ...]:
    """Hashes of terms by how many words they have."""
    by_length: dict[int, set[int]] = {}
    for term in terms:
        by_length.setdefault(len(word_list(term)), set()).add(hash_words(term))
    return tuple((n, np.array(sorted(hashes), np.uint64)) for n, hashes in sorted(by_length.items()))


@lru_cache(maxsize=4)
def _package_words(package: str) -> tuple[str, ...]:
    """A package's list, read as text: its code is not run."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise MissingDependency(package, extra="moderation", needed_for=f"the word list of {package}")
    lines = (Path(found.origin).parent / PACKAGES[package]).read_text("utf-8").splitlines()
    return tuple(line for line in lines if word_list(line))


@lru_cache(maxsize=8)
def scorer(name: str) -> TextScorer:
    """A scorer, made once a process.

    Raises:
        BadInput: none has that name.
    """
    if name not in SCORERS:
        raise BadInput(f"no scorer is called {name!r}{did_you_mean(name, SCORERS)}", where="scorers")
    return SCORERS[name]()
