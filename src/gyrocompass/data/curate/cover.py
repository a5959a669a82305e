"""Covering spans of a document: masks and pseudonyms, in the right part of it.

    spans of all rules --cover--> a new Document, which knows the one it was made from

Offsets are those of the text that steps see: a document's parts joined by a blank line. A span is cut at the
ends of the parts it lies in. Overlapping spans are covered once, by the rule that comes first.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from gyrocompass.data.curate.corpus import PART_SEPARATOR
from gyrocompass.data.curate.spans import Span
from gyrocompass.data.curate.spans import mask as mask
from gyrocompass.data.document import Document, Step

Replacement = Callable[[Span, str], str]
"""(a span, what it covers) -> what stands there instead."""


class Cover(NamedTuple):
    """A span to be covered."""

    span: Span
    by: Replacement


class Covered(NamedTuple):
    """The document after it, and how many spans of each kind were covered."""

    document: Document
    kinds: Counter[str]


def cover(document: Document, covers: Iterable[Cover]) -> Covered:
    """Cover spans of a document.

    >>> document = Document(kind="text", text="Write to a@b.de", path="a.txt", source="s", slice="text")
    >>> covered = cover(document, [Cover(Span(9, 15, "email", 1.0), mask)])
    >>> covered.document.text, covered.document.origin_ids == (document.id,)
    ('Write to [email]', True)
    """
    chosen = _disjoint(covers)
    begin, texts, kinds = 0, [], Counter[str]()
    maps: list[Callable[[int], int]] = []
    for text in document.texts:
        own = [
            Cover(span._replace(start=max(span.start - begin, 0), end=min(span.end - begin, len(text))), by)
            for span, by in chosen
            if max(span.start, begin) < min(span.end, begin + len(text))
        ]
        covered, moved = _cover_text(text, own)
        texts.append(covered)
        maps.append(moved)
        kinds.update(span.kind for span, _ in own)
        begin += len(text) + len(PART_SEPARATOR)
    if not kinds:
        return Covered(document, kinds)
    changed = _with_texts(document, texts, maps)
    noted = document.provenance
    if noted is not None and document.kind == "text":
        repairs = (each._replace(start=maps[0](each.start), end=maps[0](each.end)) for each in noted.repairs)
        noted = noted._replace(repairs=tuple(repairs))
    origin_ids = (*document.origin_ids, document.id)
    return Covered(replace(changed, origin_ids=origin_ids, provenance=noted), kinds)


def _disjoint(covers: Iterable[Cover]) -> list[Cover]:
    """Covers without those that overlap an earlier one, by place."""
    taken: list[Cover] = []
    for new in covers:
        place = bisect_left(taken, new.span.start, key=lambda old: old.span.start)
        after_last = place == 0 or taken[place - 1].span.end <= new.span.start
        before_next = place == len(taken) or new.span.end <= taken[place].span.start
        if new.span.start < new.span.end and after_last and before_next:
            taken.insert(place, new)
    return taken


def _cover_text(text: str, covers: Sequence[Cover]) -> tuple[str, Callable[[int], int]]:
    """The text with spans replaced, and where each place of it has gone."""
    pieces, place = [], 0
    shifts: list[tuple[int, int]] = []
    length = 0
    for span, by in covers:
        new = by(span, text[span.start : span.end])
        pieces += [text[place : span.start], new]
        length += span.start - place + len(new)
        shifts.append((span.end, length - span.end))
        place = span.end

    def moved(old: int) -> int:
        old = next((span.end for span, _ in covers if span.start < old < span.end), old)
        return old + next((shift for end, shift in reversed(shifts) if end <= old), 0)

    return "".join([*pieces, text[place:]]), moved


def _with_texts(document: Document, texts: Sequence[str], maps: Sequence[Callable[[int], int]]) -> Document:
    """The document with other texts, in the order of `Document.texts`."""
    match document.kind:
        case "text":
            return replace(document, text=texts[0])
        case "completion":
            steps = tuple(Step(maps[1](step.end), step.reward) for step in document.steps)
            return replace(document, prompt=texts[0], text=texts[1], steps=steps)
        case "chat":
            turns = zip(document.messages, texts, strict=True)
            return replace(document, messages=tuple(turn._replace(content=text) for turn, text in turns))
        case "preference":
            n = len(document.messages)
            asked = zip(document.messages, texts[1 : 1 + n], strict=True)
            messages = tuple(turn._replace(content=text) for turn, text in asked)
            chosen, rejected, *gold = texts[1 + n :]
            return replace(
                document,
                prompt=texts[0],
                messages=messages,
                text=chosen,
                rejected=rejected,
                gold=gold[0] if gold else "",
            )
