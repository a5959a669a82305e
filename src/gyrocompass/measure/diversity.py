"""How much texts that were drawn for one prompt differ from each other.

    distinct-n   different runs of n words / runs of n words, over all texts of a prompt; 1: no run twice
    self-BLEU    mean over texts of BLEU-4 of the text against the others; 1: all the same

BLEU-4 is exp(mean over n = 1..4 of log p_n) times the brevity penalty min(1, exp(1 - r / c)), r the length of
the other text closest to the text's own length c. p_n is the clipped share of the text's runs of n words that
stand in another text; for n > 1 one is added above and below (Lin and Och 2004), so that a short text does
not count as nothing. p_1 = 0 makes it 0. Words are runs of letters, digits and underscores, or single other
signs.

Sources: Li et al. 2016 (distinct-n); Zhu et al. 2018, "Texygen" (self-BLEU).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

_WORDS = re.compile(r"\w+|[^\w\s]")
_LONGEST = 4


def distinct(texts: Sequence[str], n: int) -> float:
    """distinct-n of the texts of one prompt; 0 where no text has n words.

    >>> distinct(["a b a", "a c"], 1)
    0.6
    """
    runs = [run for text in texts for run in _runs(_words(text), n)]
    return len(set(runs)) / len(runs) if runs else 0.0


def self_bleu(texts: Sequence[str]) -> float:
    """Self-BLEU of the texts of one prompt, at least two.

    >>> self_bleu(["the same", "the same", "the same"])
    1.0
    """
    split = [_words(text) for text in texts]
    found = [bleu(own, [*split[:place], *split[place + 1 :]]) for place, own in enumerate(split)]
    return sum(found) / len(found)


def bleu(words: Sequence[str], others: Sequence[Sequence[str]]) -> float:
    """BLEU-4 of a text against others; see the module."""
    if not words:
        return 0.0
    total = 0.0
    for n in range(1, _LONGEST + 1):
        own = Counter(_runs(words, n))
        most: Counter[tuple[str, ...]] = Counter()
        for other in others:
            most |= Counter(_runs(other, n))
        right, count = sum((own & most).values()), sum(own.values())
        if n == 1 and right == 0:
            return 0.0
        smooth = int(n > 1)
        total += math.log((right + smooth) / (count + smooth)) / _LONGEST
    closest = min((len(other) for other in others), key=lambda length: (abs(length - len(words)), length))
    return math.exp(total + min(0.0, 1 - closest / len(words)))


def _words(text: str) -> list[str]:
    return _WORDS.findall(text)


def _runs(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[place : place + n]) for place in range(len(words) - n + 1)]
