"""Canaries: texts with personal data and secrets whose places are known, to measure what finders find.

    seed, kinds --plant--> Planted(text, truth) --measure(find)--> Found by slice and kind: recall, precision

Values are drawn, with check digits that are right, in the forms that people write; around them stand
sentences, code or chat, and among them decoys: what looks alike and is not (versions, dates, ISBNs, hashes,
slices of lists, numbers whose check digits are wrong). Carriers hold nothing else that a finder could rightly
find.

A planted value counts as found where a span of its kind covers at least half of it. A span that counts for
nothing planted is a false one, whatever its kind says.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from gyrocompass.data.curate.spans import Span

Find = Callable[[str], Sequence[Span]]
Draw = Callable[[random.Random], str]

CARRIERS: dict[str, tuple[str, ...]] = {
    "prose": (
        "After the meeting we agreed that {} should go into the file.",
        "For anything else the letter gives {}, which nobody had noticed before.",
        "The clerk wrote down {} and turned the page.",
        "She asked twice whether {} was right; it was.",
        "In the second annex you will find {}.",
        "He said: {}",
        "Two of them ({}) were crossed out; the third stood in [brackets].",
        "* {}; see the list above",
    ),
    "code": (
        'record = {{"value": "{}", "kind": None}}',
        "# seen in the wild: {}",
        "assert parse('{}') is not None",
        'VALUES.append("{}")  # keep',
        "print(f'{{name}}: {}')",
        "value: {}",
        "key={}&page=next",
        "left;{};right;none",
        "<td>{}</td><td>none</td>",
        "VALUE={}",
        "\t'{}',",
    ),
    "chat": (
        "user: hey, could you note {} please",
        "assistant: I have {} on file, is that still the case?",
        "user: it's {}, thanks!",
        "assistant: Sure. You wrote {}. Anything else?",
    ),
}
"""Sentences of each slice, with a place for one value."""


@dataclass(frozen=True)
class Planted:
    """A text and what is planted in it."""

    text: str
    slice: str
    truth: tuple[Span, ...]


@dataclass
class Found:
    """What a finder found of what was planted: additive counts."""

    planted: int = 0
    hits: int = 0
    """Planted values that it found."""
    false: int = 0
    """Spans of this kind at no planted value of it."""

    @property
    def recall(self) -> float:
        """Share of planted values that were found; 1 where none was planted."""
        return self.hits / self.planted if self.planted else 1.0

    @property
    def precision(self) -> float:
        """Share of what was found that was planted; 1 where nothing was found."""
        return self.hits / (self.hits + self.false) if self.hits + self.false else 1.0


def plant(
    draws: Mapping[str, Draw],
    decoys: Sequence[Draw],
    *,
    seed: int,
    n: int,
    before: Mapping[str, str] = MappingProxyType({}),
    after: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Planted]:
    """Texts of six lines: planted values and decoys, half and half.

    Args:
        draws: draws a value of each kind.
        decoys: draw what must not be found.
        seed: of everything that is drawn.
        n: texts of each slice.
        before: for some kinds what stands before a value and is no part of it.
        after: the same behind it.
    """
    for slice_name in CARRIERS:
        chance = random.Random(f"{seed} {slice_name}")
        for number in range(n):
            text, truth = "", []
            for line in range(6):
                head, tail = _carrier(slice_name, chance)
                if line % 2:
                    value = chance.choice(decoys)(chance)
                else:
                    kind = list(draws)[(number * 3 + line // 2) % len(draws)]
                    head, tail = head + before.get(kind, ""), after.get(kind, "") + tail
                    value = draws[kind](chance)
                    start = len(text) + len(head)
                    truth.append(Span(start, start + len(value), kind, 1.0))
                text += head + value + tail + "\n"
            yield Planted(text, slice_name, tuple(truth))


def _carrier(slice_name: str, chance: random.Random) -> tuple[str, str]:
    """What stands before and behind a value."""
    head, tail = chance.choice(CARRIERS[slice_name]).replace("{}", "\0").split("\0")
    return head.replace("{{", "{").replace("}}", "}"), tail.replace("{{", "{").replace("}}", "}")


def measure(
    find: Find, planted: Iterable[Planted], minimum_score: float = 0.5, same_kind: bool = True
) -> dict[tuple[str, str], Found]:
    """What a finder finds, by slice and kind; ("all", KIND) and (SLICE, "all") add them up.

    Args:
        find: gives the spans of a text.
        planted: the texts.
        minimum_score: of the spans that count.
        same_kind: whether a hit is of the kind that was planted; False for finders with names of their own.
    """
    table: dict[tuple[str, str], Found] = {}

    def cells(slice_name: str, kind: str) -> list[Found]:
        keys = [(slice_name, kind), ("all", kind), (slice_name, "all"), ("all", "all")]
        return [table.setdefault(key, Found()) for key in keys]

    for text in planted:
        spans = [span for span in find(text.text) if span.score >= minimum_score]
        used: set[Span] = set()
        for true in text.truth:
            hits = [
                span for span in spans if _covers(span, true) and (span.kind == true.kind or not same_kind)
            ]
            used.update(hits)
            for cell in cells(text.slice, true.kind):
                cell.planted += 1
                cell.hits += bool(hits)
        for span in spans:
            if span not in used:
                for cell in cells(text.slice, span.kind):
                    cell.false += 1
    return table


def _covers(span: Span, true: Span) -> bool:
    """Whether a span covers half of what is true, and is at most half too long."""
    common = min(span.end, true.end) - max(span.start, true.start)
    return 2 * common >= true.end - true.start and 2 * common >= span.end - span.start
