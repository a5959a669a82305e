"""Spans: where in a text something stands, what it is and how sure that is; and what is put in its place.

    list[list[Span]] --to_arrow--> SPANS array --from_arrow--> list[list[Span]]
    text, spans      --replace---> text

Offsets count characters of the document's `text`. Kinds are names with a dot between a family and its
members, such as `id.fr`.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from gyrocompass.data.curate.joined import Joined
from gyrocompass.data.curate.step import SPANS


class Span(NamedTuple):
    """A stretch of a text."""

    start: int
    end: int
    """One past its last character."""
    kind: str
    score: float
    """0 to 1: how likely it is what `kind` says."""


def to_arrow(spans: Sequence[Sequence[Span]]) -> pa.ListArray:
    """One list of spans a document as an Arrow array of the type SPANS."""
    offsets = np.cumsum([0, *(len(of_document) for of_document in spans)]).astype(np.int32)
    flat = [span for of_document in spans for span in of_document]
    fields = SPANS.value_type
    columns = [pa.array([span[number] for span in flat], field.type) for number, field in enumerate(fields)]
    return pa.ListArray.from_arrays(offsets, pa.StructArray.from_arrays(columns, fields=list(fields)))


def from_arrow(column: pa.Array | pa.ChunkedArray) -> list[list[Span]]:
    """The spans of each document; a null counts as none."""
    return [[Span(**span) for span in of_document or ()] for of_document in column.to_pylist()]


def by_document(joined: Joined, found: Iterable[Span]) -> list[list[Span]]:
    """Spans of the joined text as spans of its documents, without overlaps, in their order."""
    found = list(found)
    spans: list[list[Span]] = [[] for _ in joined.texts]
    rows = joined.rows_of(np.fromiter((span.start for span in found), np.int64, len(found)))
    for span, row in zip(found, rows.tolist(), strict=True):
        offset = int(joined.start_D[row])
        spans[row].append(span._replace(start=span.start - offset, end=span.end - offset))
    return [disjoint(of_document) if of_document else of_document for of_document in spans]


def disjoint(spans: Iterable[Span]) -> list[Span]:
    """Spans without those that overlap a better one: of the higher score, then the longer, then the first.

    >>> disjoint([Span(0, 5, "phone", 0.4), Span(2, 9, "card", 0.9), Span(10, 12, "ip", 0.9)])
    [Span(start=2, end=9, kind='card', score=0.9), Span(start=10, end=12, kind='ip', score=0.9)]
    """
    kept: list[Span] = []
    for span in sorted(
        set(spans), key=lambda span: (-span.score, span.start - span.end, span.start, span.kind)
    ):
        place = bisect.bisect(kept, span)
        before, after = kept[max(place - 1, 0) : place], kept[place : place + 1]
        if all(other.end <= span.start for other in before) and all(
            span.end <= other.start for other in after
        ):
            kept.insert(place, span)
    return kept


def replace(text: str, spans: Iterable[Span], instead: Callable[[Span, str], str]) -> str:
    """The text with other words in place of its spans.

    Args:
        text: a document's text.
        spans: of it, without overlaps.
        instead: gets a span and what stands there, and gives what shall stand there.

    >>> replace("mail a@b.org now", [Span(5, 12, "email", 1.0)], mask)
    'mail [email] now'
    """
    parts: list[str] = []
    done = 0
    for span in sorted(spans):
        assert span.start >= done, "spans that are replaced do not overlap"
        parts += [text[done : span.start], instead(span, text[span.start : span.end])]
        done = span.end
    return "".join([*parts, text[done:]])


def mask(span: Span, _: str = "") -> str:
    """What stands in place of a masked span: its kind in brackets."""
    return f"[{span.kind}]"
