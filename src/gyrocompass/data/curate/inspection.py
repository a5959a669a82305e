"""What people look at in a data set: samples with their spans, lengths, surprisal, the largest clusters.

    corpus with annotations, what stays --inspect--> Inspection

All documents that were read are looked at, kept or not, since what was dropped is what needs a look. Samples
are chosen by a hash of their ids: the same data set shows the same ones, each slice and each verdict in turn,
those with spans first.

What is personal or secret is not shown: its place is, with its kind, unless `reveal` is asked for.
"""

from __future__ import annotations

import hashlib
import heapq
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gyrocompass.data.curate.card import Parts, kept_ids, span_columns, topic_of
from gyrocompass.data.curate.dataset import COVERED, LEDGER

FloatArray = npt.NDArray[np.floating[Any]]

SAMPLES = 8
CLUSTERS = 10
MEMBERS = 6
"""Of a cluster: how many are named."""
EXCERPT = 900
"""Characters of a sample that are shown."""
HIDDEN_TOPICS = ("personal", "secrets")

_SURPRISAL = re.compile(r"\.(bits|nats)_per_")
_BEFORE = 120
_POOL = 4


class Piece(NamedTuple):
    """A stretch of a sample."""

    text: str
    kinds: tuple[str, ...]
    """What spans say of it; empty where none does."""
    topic: str
    """Of the first of them: a key of `TOPICS`, or ""."""


class Sample(NamedTuple):
    """A document to look at."""

    id: str
    path: str
    slice: str
    licence: str | None
    language: str | None
    n_bytes: int
    verdict: str
    """kept, covered, or the rule that dropped it."""
    pieces: tuple[Piece, ...]
    is_cut: bool
    """Whether there is more of it."""


class Cluster(NamedTuple):
    """Documents that a step takes for copies of each other."""

    step: str
    name: str
    size: int
    kept: int
    members: tuple[tuple[str, str], ...]
    """Path and verdict of the first of them, those that stay first."""


class Histogram(NamedTuple):
    """How a figure is spread, by slice."""

    name: str
    by_slice: Mapping[str, FloatArray]
    """Every document's figure."""


class Inspection(NamedTuple):
    """What there is to see."""

    lengths: Histogram
    """Bytes of all documents that stay."""
    surprisals: tuple[Histogram, ...]
    """For each column that measures it; empty where no step does."""
    clusters: tuple[Cluster, ...]
    samples: tuple[Sample, ...]


def inspect(parts: Parts, *, samples: int = SAMPLES, reveal: bool = False) -> Inspection:
    """Look at a data set.

    Args:
        parts: see `open_parts`.
        samples: how many documents.
        reveal: whether what is personal or secret is shown.
    """
    verdicts = _Verdicts(parts)
    return Inspection(
        _histogram(parts, "n_bytes", verdicts),
        tuple(_histogram(parts, name, verdicts) for name in _surprisal_columns(parts)),
        tuple(_clusters(parts, verdicts)),
        tuple(_samples(parts, verdicts, samples, reveal)),
    )


class _Verdicts:
    """What became of each document of the corpus."""

    def __init__(self, parts: Parts) -> None:
        self.kept = kept_ids(parts.dataset.path)
        ledger = pq.read_table(parts.dataset.path / LEDGER, columns=["id", "title"])
        self.dropped = dict(zip(ledger["id"].to_pylist(), ledger["title"].to_pylist(), strict=True))
        self.covered = set(pq.read_table(parts.dataset.path / COVERED, columns=["id"])["id"].to_pylist())

    def of(self, document_id: str) -> str:
        if document_id in self.dropped:
            return f"dropped: {self.dropped[document_id]}"
        return "covered" if document_id in self.covered else "kept"


# --- figures ---


def _surprisal_columns(parts: Parts) -> list[str]:
    return [
        name
        for name, kind in parts.config.known.items()
        if pa.types.is_floating(kind) and _SURPRISAL.search(name)
    ]


def _histogram(parts: Parts, column: str, verdicts: _Verdicts) -> Histogram:
    figures: defaultdict[str, list[FloatArray]] = defaultdict(list)
    for batch in parts.corpus.batches(["id", "slice", column]):
        stays = pa.array([name in verdicts.kept for name in batch["id"].to_pylist()])
        known = batch.filter(pc.and_(stays, pc.is_valid(batch[column])))
        slices = known["slice"].to_pylist()
        values = known[column].cast(pa.float64()).to_numpy(zero_copy_only=False)
        for name in dict.fromkeys(slices):
            figures[name].append(values[[each == name for each in slices]])
    return Histogram(column, {name: np.concatenate(each) for name, each in sorted(figures.items())})


# --- clusters ---


def _clusters(parts: Parts, verdicts: _Verdicts) -> Iterator[Cluster]:
    """The largest clusters of each step that names them."""
    for column, kind in parts.config.known.items():
        step, _, name = column.partition(".")
        if name != "cluster" or not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            continue
        sizes: Counter[str] = Counter()
        for batch in parts.corpus.batches(["id", column]):
            sizes.update(value for value in batch[column].to_pylist() if value is not None)
        largest = {value: size for value, size in sizes.most_common(CLUSTERS) if size > 1}
        members: defaultdict[str, list[tuple[bool, str, str]]] = defaultdict(list)
        for batch in parts.corpus.batches(["id", "path", column]):
            for row in batch.filter(pc.is_in(batch[column], pa.array([*largest], kind))).to_pylist():
                stays = row["id"] in verdicts.kept
                members[row[column]].append((not stays, row["path"], verdicts.of(row["id"])))
        for value, size in largest.items():
            found = sorted(members[value])
            kept = sum(not gone for gone, _, _ in found)
            shown = tuple((path, verdict) for _, path, verdict in found[:MEMBERS])
            yield Cluster(step, value, size, kept, shown)


# --- samples ---


def _samples(parts: Parts, verdicts: _Verdicts, most: int, reveal: bool) -> Iterator[Sample]:
    columns = span_columns(parts.config)
    facts = ["id", "path", "slice", "licence", "language", "n_bytes", "text"]
    chosen = _chosen(parts, verdicts, columns, most)
    for row in parts.corpus.take(chosen, [*facts, *columns]).to_pylist() if chosen else ():
        spans = [
            (span["start"], span["end"], span["kind"], topic_of(column.partition(".")[0]))
            for column in columns
            for span in row[column] or ()
        ]
        pieces, is_cut = excerpt(row["text"], spans, reveal)
        facts_of = {name: row[name] for name in facts if name != "text"}
        yield Sample(**facts_of, verdict=verdicts.of(row["id"]), pieces=pieces, is_cut=is_cut)


def _chosen(parts: Parts, verdicts: _Verdicts, columns: Sequence[str], most: int) -> list[str]:
    """Ids of samples: of each slice and verdict in turn, those with spans first, else by a hash."""
    pools: defaultdict[tuple[str, str], list[tuple[bool, int, str]]] = defaultdict(list)
    for batch in parts.corpus.batches(["id", "slice", *columns]):
        has_spans = np.zeros(batch.num_rows, np.bool_)
        for column in columns:
            counts = pc.fill_null(pc.list_value_length(batch[column]), 0)
            has_spans |= counts.to_numpy(zero_copy_only=False) > 0
        ids, slices = batch["id"].to_pylist(), batch["slice"].to_pylist()
        for name, slice_name, found in zip(ids, slices, has_spans.tolist(), strict=True):
            number = -int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])
            pool = pools[verdicts.of(name), slice_name]
            # A heap of the best few: its first is the worst of them.
            heapq.heappush(pool, (found, number, name))
            if len(pool) > max(_POOL, most):
                heapq.heappop(pool)
    waiting = [sorted(pool, reverse=True) for _, pool in sorted(pools.items())]
    chosen: list[str] = []
    while len(chosen) < most and any(waiting):
        for pool in waiting:
            if pool and len(chosen) < most:
                chosen.append(pool.pop(0)[2])
    return chosen


def excerpt(
    text: str, spans: Sequence[tuple[int, int, str, str]], reveal: bool
) -> tuple[tuple[Piece, ...], bool]:
    """A part of a text around its first span, cut where spans begin and end; and whether it is a part.

    Args:
        text: the document.
        spans: start, end, kind and topic; they may overlap.
        reveal: whether what is personal or secret is shown.

    >>> excerpt("Mail a@b.c now", [(5, 10, "email", "personal")], reveal=False)[0][1]
    Piece(text='[email]', kinds=('email',), topic='personal')
    """
    spans = sorted(span for span in spans if span[0] < span[1])
    begin = max(0, spans[0][0] - _BEFORE) if spans and spans[0][0] > EXCERPT // 2 else 0
    begin = max(text.rfind("\n", 0, begin) + 1, begin - _BEFORE)  # whole lines, where they are not too long
    end = min(len(text), begin + EXCERPT)
    inside = [span for span in spans if span[0] < end and span[1] > begin]
    cuts = sorted({begin, end, *(min(max(at, begin), end) for span in inside for at in span[:2])})
    pieces: list[Piece] = []
    hidden_until = begin
    for start, stop in pairwise(cuts):
        over = [span for span in inside if span[0] < stop and span[1] > start]
        kinds = tuple(dict.fromkeys(span[2] for span in over))
        topic = next((span[3] for span in over if span[3]), "")
        hiding = [] if reveal else [span for span in over if span[3] in HIDDEN_TOPICS]
        if not hiding:
            pieces.append(Piece(text[start:stop], kinds, topic))
        elif start >= hidden_until:  # one mark for a span, however others cut it
            hidden_until = max(span[1] for span in hiding)
            pieces.append(Piece(f"[{hiding[0][2]}]", kinds, hiding[0][3]))
    return tuple(pieces), begin > 0 or end < len(text)
