"""The items of benchmarks that a model will be tested on, and what of them can be found in a text.

    a file --read_items--> Item(question words, answer words) --Index--> hashes of runs of words

Each item is its question and, where the file has one, its answer. Files are JSONL or JSON lists of objects,
whose fields the config names, or text with one item a line.

An item of at least `ngram` words is looked for by its runs of that many words; a shorter one as a whole, if
it has at least `shortest` words. What is shorter still cannot be told from chance and is listed as unchecked.

Shape legend: H hashes, sorted; P postings of hashes to items.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gyrocompass.core.errors import BadInput
from gyrocompass.data.curate.content_file import ContentFile
from gyrocompass.data.curate.joined import Int64Array, Joined
from gyrocompass.data.curate.word_runs import Hashes, WordRuns, word_list

_BITS = 22


class Benchmark(ContentFile):
    """A benchmark in a file: JSONL, a JSON list, or text with one item a line.

    Args:
        path: where it is.
        sha256: see `ContentFile`.
        name: what hits and certificates call it.
        question: the field of the question; nested ones with dots.
        answer: the field of the answer; None: items have none.
    """

    name: str
    question: str = "question"
    answer: str | None = None


class Item(NamedTuple):
    """A question, and its answer if there is one, in words."""

    benchmark: str
    number: int
    """Counted from 0 in its file."""
    question: tuple[str, ...]
    answer: tuple[str, ...]

    @property
    def label(self) -> str:
        """How hits name it."""
        return f"{self.benchmark}#{self.number}"


def read_items(benchmark: Benchmark) -> list[Item]:
    """The items of a benchmark.

    Raises:
        BadInput: the file is not what the config says.
    """
    items = [
        Item(benchmark.name, number, tuple(word_list(question)), tuple(word_list(answer)))
        for number, (question, answer) in enumerate(_pairs(benchmark))
    ]
    if not items:
        raise BadInput(f"the benchmark {benchmark.name} has no items", where=benchmark.path)
    return items


def _pairs(benchmark: Benchmark) -> Iterator[tuple[str, str]]:
    path = benchmark.path
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"the benchmark cannot be read: {error}", where=path) from None
    if path.suffix not in {".json", ".jsonl", ".ndjson"}:
        yield from ((line, "") for line in text.splitlines() if line.strip())
        return
    for place, record in _records(text, path):
        question = _field(record, benchmark.question)
        answer = _field(record, benchmark.answer) if benchmark.answer else ""
        for name, found in ((benchmark.question, question), (benchmark.answer, answer)):
            if found is None:
                raise BadInput(
                    f"an item of the benchmark {benchmark.name} has no field {name}",
                    where=f"{path}:{place}",
                    fix="name the fields that hold the question and the answer",
                )
        yield str(question), str(answer)


def _records(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    """Records with their line, or their place in a list."""
    try:
        if path.suffix == ".json":
            records = json.loads(text)
            if not isinstance(records, list):
                raise BadInput("a benchmark in JSON is a list of objects", where=path)
            yield from enumerate(records, 1)
        else:
            for number, line in enumerate(text.splitlines(), 1):
                if line.strip():
                    yield number, json.loads(line)
    except json.JSONDecodeError as error:
        raise BadInput(f"not JSON: {error.msg}", where=f"{path}:{error.lineno}") from None


def _field(record: Any, name: str | None) -> Any:
    for part in (name or "").split("."):
        record = record.get(part) if isinstance(record, dict) else None
    return "; ".join(map(str, record)) if isinstance(record, list) else record


class Index:
    """Which item holds which run of words.

    Args:
        items: of all benchmarks.
        ngram: words of a run.
        shortest: words of the shortest item that is looked for as a whole.
    """

    def __init__(self, items: Sequence[Item], ngram: int, shortest: int) -> None:
        self.items = list(items)
        self.ngram, self.shortest = ngram, shortest
        by_length: dict[int, list[int]] = {}
        for number, item in enumerate(self.items):
            n = len(item.question)
            if n >= shortest:
                by_length.setdefault(min(n, ngram), []).append(number)
        self.unchecked = [item for item in self.items if len(item.question) < shortest]
        self.by_length = {n: Postings(self.items, numbers, n) for n, numbers in sorted(by_length.items())}


class Postings:
    """For runs of n words, the items that hold them and where.

    Args:
        items: all items.
        numbers: those that are indexed.
        n: words of a run.
    """

    def __init__(self, items: Sequence[Item], numbers: Sequence[int], n: int) -> None:
        words = WordRuns(Joined([" ".join(items[number].question) for number in numbers]))
        first, hashes = words.ngram_hashes(n)
        row = words.row_W[first]
        begin = np.concatenate([[0], np.cumsum(words.n_words_D)])
        order = np.lexsort((first, hashes))
        self.n = n
        self.hash_P: Hashes = hashes[order]
        self.item_P: Int64Array = np.array(numbers, np.int64)[row][order]
        self.offset_P: Int64Array = (first - begin[row])[order]
        self._bitmap = np.zeros(1 << _BITS, np.bool_)
        self._bitmap[hashes & np.uint64((1 << _BITS) - 1)] = True

    def find(self, hash_G: Hashes) -> tuple[Int64Array, Int64Array]:
        """Pairs of a place among these hashes and a posting with the same hash."""
        candidates = np.flatnonzero(self._bitmap[hash_G & np.uint64((1 << _BITS) - 1)])
        left = np.searchsorted(self.hash_P, hash_G[candidates], side="left")
        right = np.searchsorted(self.hash_P, hash_G[candidates], side="right")
        count = right - left
        place = np.repeat(candidates, count)
        within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        return place, np.repeat(left, count) + within
