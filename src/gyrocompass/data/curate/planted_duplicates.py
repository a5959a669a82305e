"""Planted duplicates with the exact truth: what duplicate steps are measured on.

    texts --plant--> Planted            documents, what each is a variant of, and every pair that is alike
    found pairs, Planted --measured--> Measured(recall, precision)

Kinds of variants: `copy`; `shouted` (upper case, other spaces); `edited` (one word in fifty is another one);
`longer` (a notice stands before it); `shorter` (the last fifth is missing); `moved` (its lines in another
order); `spliced` (half of it and half of another document: no duplicate, but contained in two).

The truth is not what was planted but what is there: the Jaccard similarity of every two documents that share
any run of words, counted from an inverted index of Python sets, with a regular expression for words. It
shares no code with the steps.
"""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

KINDS = ("copy", "shouted", "edited", "longer", "shorter", "moved", "spliced")

_NOTICE = "This text may be copied and given to others as long as this notice stands before it unchanged."


class Planted(NamedTuple):
    """Documents and what is true of them."""

    texts: list[str]
    kinds: list[str]
    """"base", or one of `KINDS`."""
    origins: list[tuple[int, ...]]
    """The documents that each was made from."""
    jaccard: dict[tuple[int, int], float]
    """Of every pair that shares anything, the smaller number first."""

    def pairs(self, threshold: float) -> set[tuple[int, int]]:
        """All pairs at or above it."""
        return {pair for pair, jaccard in self.jaccard.items() if jaccard >= threshold}


class Measured(NamedTuple):
    """How much of the truth was found, and how much of what was found is true, with the counts."""

    recall: float
    precision: float
    n_true: int
    n_found: int


def measured(found: Iterable[tuple[int, int]], true: Iterable[tuple[int, int]]) -> Measured:
    """Recall and precision; 1 where nothing was to be found, or nothing was.

    >>> measured([(1, 2), (3, 1)], [(2, 1)])
    Measured(recall=1.0, precision=0.5, n_true=1, n_found=2)
    """
    got, wanted = ({(min(pair), max(pair)) for pair in pairs} for pairs in (found, true))
    right = len(got & wanted)
    recall = right / len(wanted) if wanted else 1.0
    return Measured(recall, right / len(got) if got else 1.0, len(wanted), len(got))


def plant(texts: Sequence[str], share: float = 0.25, seed: int = 0, shingle_words: int = 5) -> Planted:
    """Add variants of some texts and put all in a random order.

    Args:
        texts: at least two; they may be alike already, and the truth says so.
        share: variants for each text.
        seed: of the choice and the order.
        shingle_words: words in a shingle.
    """
    draw = random.Random(seed)
    vocabulary = sorted({word for text in texts for word in re.findall(r"\w+", text) if len(word) > 3})
    rows: list[tuple[str, str, tuple[int, ...]]] = [(text, "base", ()) for text in texts]
    for number in range(round(share * len(texts))):
        kind = KINDS[number % len(KINDS)]
        one, other = draw.sample(range(len(texts)), 2)
        origins = (one, other) if kind == "spliced" else (one,)
        rows.append((_variant(kind, texts[one], texts[other], draw, vocabulary), kind, origins))
    order = draw.sample(range(len(rows)), len(rows))
    place = {row: number for number, row in enumerate(order)}
    kept = [rows[row] for row in order]
    return Planted(
        [text for text, _, _ in kept],
        [kind for _, kind, _ in kept],
        [tuple(place[row] for row in origins) for _, _, origins in kept],
        all_similarities([text for text, _, _ in kept], shingle_words),
    )


def shingle_set(text: str, shingle_words: int) -> frozenset[tuple[str, ...]]:
    """The set whose similarity counts, as the definition says it."""
    words = re.findall(r"\w+", text.lower())
    if not words:
        return frozenset()
    count = max(1, len(words) - shingle_words + 1)
    return frozenset(tuple(words[place : place + shingle_words]) for place in range(count))


def all_similarities(texts: Sequence[str], shingle_words: int) -> dict[tuple[int, int], float]:
    """The Jaccard similarity of every two texts that share a shingle."""
    sets = [shingle_set(text, shingle_words) for text in texts]
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    shared: Counter[tuple[int, int]] = Counter()
    for document, shingles in enumerate(sets):
        for shingle in shingles:
            shared.update((other, document) for other in holders[shingle])
            holders[shingle].append(document)
    return {
        (one, two): count / (len(sets[one]) + len(sets[two]) - count) for (one, two), count in shared.items()
    }


def _variant(kind: str, text: str, other: str, draw: random.Random, vocabulary: Sequence[str]) -> str:
    words = text.split(" ")
    match kind:
        case "copy":
            return text
        case "shouted":
            return re.sub(r"\s+", " \n", text).upper()
        case "edited":
            return re.sub(
                r"\w+", lambda word: draw.choice(vocabulary) if draw.random() < 0.02 else word[0], text
            )
        case "longer":
            return f"{_NOTICE}\n{text}"
        case "shorter":
            return " ".join(words[: max(1, len(words) * 4 // 5)])
        case "moved":
            lines = text.splitlines()
            draw.shuffle(lines)
            return "\n".join(lines)
        case "spliced":
            halves = text.split(), other.split()
            return " ".join(halves[0][: len(halves[0]) // 2] + halves[1][len(halves[1]) // 2 :])
    raise AssertionError(kind)
