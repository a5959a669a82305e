"""Decontamination: which documents hold items of the benchmarks that a model will be tested on.

    documents, benchmarks --Decontamination--> spans [(start, end, "substring:gsm8k#17", 1.0)]
    annotations           --Certificate------> what was checked, how, and what hit

Four tests, all on words in small letters whatever stands between them:

    ngram      a run of `ngram` words of the question (or the whole of a shorter one) stands in the document;
               score: the share of the question's runs that do
    substring  all the question's words stand there, in one piece; score 1
    answer     as one of these, and the answer's words follow within `answer_window` words; score 1
    jaccard    a stretch as long as the question shares enough runs of `jaccard_ngram` words with it:
               |A and B| / |A or B| >= `jaccard`; what was edited is found so, where no long run is left

Hits by hash are compared word by word before they count. The surest test names the span, the order being
answer, substring, ngram, jaccard. Items that are too short to be told from chance are not looked for, and the
certificate names them.

Left out: translations and paraphrases, which need a model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
from pydantic import Field, PositiveInt, model_validator

from gyrocompass.core.errors import BadInput
from gyrocompass.data.curate.benchmark_items import Benchmark, Index, Item, Postings, read_items
from gyrocompass.data.curate.blocks import by_blocks
from gyrocompass.data.curate.joined import Joined
from gyrocompass.data.curate.spans import Span, from_arrow, to_arrow
from gyrocompass.data.curate.step import RecordStep, register
from gyrocompass.data.curate.word_runs import WordRuns, small_letters

HOW = ("answer", "substring", "ngram", "jaccard")
"""The tests, the surest first."""

_COMMON = 100
"""Runs of `jaccard_ngram` words that so many places of items share say nothing about any one of them."""


class _Hit(NamedTuple):
    """An item in a document."""

    row: int
    item: int
    how: str
    score: float
    first: int
    """Its first word, counted over the batch."""
    last: int


@register
class Decontamination(RecordStep):
    """Marks what documents hold of benchmarks.

    Args:
        benchmarks: the files.
        ngram: words of a run that says a document is contaminated.
        shortest: words of the shortest question that is looked for.
        coverage: the least share of a question's runs of `ngram` words; 0: one is enough.
        jaccard: the least similarity; None: the test is left out.
        jaccard_ngram: words of the runs it compares.
        answer_window: words behind a question in which its answer counts.
    """

    name: ClassVar[str] = "decontamination"

    benchmarks: tuple[Benchmark, ...]
    ngram: PositiveInt = 13
    shortest: PositiveInt = 5
    coverage: float = Field(0.0, ge=0, le=1)
    jaccard: float | None = Field(0.5, gt=0, le=1)
    jaccard_ngram: PositiveInt = 3
    answer_window: PositiveInt = 60

    @model_validator(mode="after")
    def _lengths_fit(self) -> Decontamination:
        if not self.jaccard_ngram <= self.shortest <= self.ngram:
            raise ValueError("jaccard_ngram <= shortest <= ngram, or some items would never be looked for")
        names = [benchmark.name for benchmark in self.benchmarks]
        if len(set(names)) < len(names):
            raise ValueError("two benchmarks have one name")
        return self

    def annotate(self, documents: pa.RecordBatch) -> pa.RecordBatch:
        """`spans`, `contaminated`, and `coverage`: the greatest score of a span, 0 of none.

        Raises:
            BadInput: a benchmark cannot be read.
        """
        return by_blocks(documents, self._annotate)

    def _annotate(self, documents: pa.RecordBatch) -> pa.RecordBatch:
        words = WordRuns(Joined.of(documents))
        spans: list[list[Span]] = [[] for _ in words.joined.texts]
        for hit in self._hits(words):
            offset = int(words.joined.start_D[hit.row])
            label = f"{hit.how}:{_index(self).items[hit.item].label}"
            start, end = int(words.start_W[hit.first]) - offset, int(words.end_W[hit.last]) - offset
            spans[hit.row].append(Span(start, end, label, hit.score))
        coverage = [max((span.score for span in found), default=0.0) for found in spans]
        return pa.RecordBatch.from_pydict(
            {
                "id": documents.column("id"),
                "spans": to_arrow([sorted(found) for found in spans]),
                "contaminated": pa.array([bool(found) for found in spans], pa.bool_()),
                "coverage": pa.array(coverage, pa.float32()),
            }
        )

    def _hits(self, words: WordRuns) -> Iterator[_Hit]:
        """The surest hit of each item in each document."""
        index = _index(self)
        best: dict[tuple[int, int], _Hit] = {}
        for postings in index.by_length.values():
            for hit in self._exact(words, index, postings):
                _keep_best(best, hit)
        if self.jaccard is not None:
            for hit in self._similar(words, index, best):
                _keep_best(best, hit)
        yield from (best[key] for key in sorted(best))

    def _exact(self, words: WordRuns, index: Index, postings: Postings) -> Iterator[_Hit]:
        """Hits of the tests ngram, substring and answer."""
        n = postings.n
        first_G, hash_G = words.ngram_hashes(n)
        place, posting = postings.find(hash_G)
        found: dict[tuple[int, int], dict[int, int]] = {}
        for first, item, offset in zip(
            first_G[place].tolist(),
            postings.item_P[posting].tolist(),
            postings.offset_P[posting].tolist(),
            strict=True,
        ):
            if _words_at(words, first, first + n) == index.items[item].question[offset : offset + n]:
                found.setdefault((int(words.row_W[first]), item), {}).setdefault(offset, first)
                if offset == 0:
                    hit = self._whole(words, index.items[item], item, first)
                    if hit:
                        yield hit
        for (row, item), offsets in found.items():
            score = len(offsets) / (len(index.items[item].question) - n + 1)
            if score >= self.coverage:
                firsts = sorted(offsets.values())
                run = [first for first in firsts if first - firsts[0] <= 2 * len(index.items[item].question)]
                yield _Hit(row, item, "ngram", score, firsts[0], run[-1] + n - 1)

    def _whole(self, words: WordRuns, item: Item, number: int, first: int) -> _Hit | None:
        """The hit of a question that stands there in one piece, with its answer if that follows."""
        row, end = int(words.row_W[first]), first + len(item.question)
        if (
            end > len(words.row_W)
            or words.row_W[end - 1] != row
            or _words_at(words, first, end) != item.question
        ):
            return None
        if item.answer:
            limit = min(end + self.answer_window + len(item.answer), len(words.row_W))
            inside = [
                word for at, word in enumerate(_words_at(words, end, limit), end) if words.row_W[at] == row
            ]
            n = len(item.answer)
            for place in range(len(inside) - n + 1):
                if tuple(inside[place : place + n]) == item.answer:
                    return _Hit(row, number, "answer", 1.0, first, end + place + n - 1)
        return _Hit(row, number, "substring", 1.0, first, end - 1)

    def _similar(self, words: WordRuns, index: Index, best: dict[tuple[int, int], _Hit]) -> Iterator[_Hit]:
        """Hits of the test jaccard: stretches that are aligned with an item by a rare run of words."""
        assert self.jaccard is not None
        postings = _similar_postings(self)
        first_G, hash_G = words.ngram_hashes(self.jaccard_ngram)
        place, posting = postings.find(hash_G)
        item_H, row_H = postings.item_P[posting], words.row_W[first_G[place]]
        start_H = first_G[place] - postings.offset_P[posting]
        order = np.lexsort((start_H, item_H, row_H))
        keys = np.stack([row_H[order], item_H[order], start_H[order] // 4])
        is_first = (
            np.any(np.diff(keys, axis=1, prepend=-1) != 0, axis=0) if keys.size else np.zeros(0, np.bool_)
        )
        bounds = np.concatenate([[0], np.cumsum(words.n_words_D)])
        votes = Counter(zip(row_H.tolist(), item_H.tolist(), strict=True))
        for at in order[is_first].tolist():
            row, item = int(row_H[at]), int(item_H[at])
            question = index.items[item].question
            n_runs = len(question) - self.jaccard_ngram + 1
            if (row, item) in best or votes[row, item] < self.jaccard * n_runs:
                continue
            first = max(int(start_H[at]), int(bounds[row]))
            last = min(int(start_H[at]) + len(question), int(bounds[row + 1]))
            score = _jaccard(question, _words_at(words, first, last), self.jaccard_ngram)
            if score >= self.jaccard:
                yield _Hit(row, item, "jaccard", score, first, last - 1)


def _keep_best(best: dict[tuple[int, int], _Hit], hit: _Hit) -> None:
    known = best.get((hit.row, hit.item))
    if known is None or (HOW.index(hit.how), -hit.score, hit.first) < (
        HOW.index(known.how),
        -known.score,
        known.first,
    ):
        best[hit.row, hit.item] = hit


def _words_at(words: WordRuns, first: int, end: int) -> tuple[str, ...]:
    places = zip(words.start_W[first:end].tolist(), words.end_W[first:end].tolist(), strict=True)
    return tuple(small_letters(words.joined.text[a:b]) for a, b in places)


def _jaccard(a: tuple[str, ...], b: tuple[str, ...], n: int) -> float:
    runs_a = {a[i : i + n] for i in range(len(a) - n + 1)}
    runs_b = {b[i : i + n] for i in range(len(b) - n + 1)}
    return len(runs_a & runs_b) / max(len(runs_a | runs_b), 1)


@lru_cache(maxsize=4)
def _index(step: Decontamination) -> Index:
    items = [item for benchmark in step.benchmarks for item in read_items(benchmark)]
    return Index(items, step.ngram, step.shortest)


@lru_cache(maxsize=4)
def _similar_postings(step: Decontamination) -> Postings:
    """Runs of `jaccard_ngram` words of all items that are long enough, without those that are everywhere."""
    index = _index(step)
    numbers = [i for i, item in enumerate(index.items) if len(item.question) >= step.shortest]
    postings = Postings(index.items, numbers, step.jaccard_ngram)
    _, inverse, counts = np.unique(postings.hash_P, return_inverse=True, return_counts=True)
    is_rare = counts[inverse] <= _COMMON
    postings.hash_P, postings.item_P = postings.hash_P[is_rare], postings.item_P[is_rare]
    postings.offset_P = postings.offset_P[is_rare]
    return postings


class Certificate:
    """What a decontamination checked and what it found: additive, and then a JSON object.

    Args:
        step: what annotated.

    Raises:
        BadInput: a benchmark cannot be read.
    """

    def __init__(self, step: Decontamination) -> None:
        if not step.benchmarks:
            raise BadInput("nothing to certify: no benchmark was given", where="decontamination.benchmarks")
        self.step = step
        self.n_documents = self.n_contaminated = 0
        self._hits: dict[str, dict[str, set[str]]] = {}

    def add(self, annotations: pa.RecordBatch | Iterable[pa.RecordBatch]) -> None:
        """Count what the step said of some documents."""
        for batch in [annotations] if isinstance(annotations, pa.RecordBatch) else annotations:
            self.n_documents += batch.num_rows
            for document, spans in zip(batch["id"].to_pylist(), from_arrow(batch["spans"]), strict=True):
                self.n_contaminated += bool(spans)
                for span in spans:
                    how, _, label = span.kind.partition(":")
                    self._hits.setdefault(label, {}).setdefault(how, set()).add(document)

    def to_json(self) -> dict[str, Any]:
        """The certificate.

        Returns:
            `settings`; for each benchmark its file's hash, how many items there are, by which test they could
            be found, which were not looked for, and which were found, in which documents, by which test; how
            many documents were checked and hit. The same documents give the same certificate in any order.
        """
        index = _index(self.step)
        return {
            "settings": self.step.model_dump(mode="json", exclude={"benchmarks"}),
            "documents": {"checked": self.n_documents, "contaminated": self.n_contaminated},
            "benchmarks": [self._benchmark(benchmark, index) for benchmark in self.step.benchmarks],
        }

    def _benchmark(self, benchmark: Benchmark, index: Index) -> dict[str, Any]:
        items = [item for item in index.items if item.benchmark == benchmark.name]
        sizes = Counter(
            "unchecked" if len(item.question) < self.step.shortest
            else "whole" if len(item.question) < self.step.ngram
            else "by_ngram"
            for item in items
        )  # fmt: skip
        found = {
            str(item.number): {how: sorted(ids) for how, ids in sorted(self._hits[item.label].items())}
            for item in items
            if item.label in self._hits
        }
        return {
            "name": benchmark.name,
            "sha256": benchmark.sha256,
            "items": {
                "all": len(items),
                **{name: sizes[name] for name in ("by_ngram", "whole", "unchecked")},
            },
            "unchecked": [item.number for item in items if len(item.question) < self.step.shortest],
            "hit_items": len(found),
            "by_test": dict(sorted(Counter(how for hits in found.values() for how in hits).items())),
            "hits": found,
        }
