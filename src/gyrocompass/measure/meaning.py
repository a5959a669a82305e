"""What several samples of one prompt agree on: clusters of texts that say the same, and their entropy.

    samples --clusters--> which of them say the same --> agreement, semantic entropy

Who says whether two texts say the same is a function of the two: by words, if the F1 of their words is at
least a bound (1: the same words in any order); or by a model that is asked whether each follows from the
other (`measure.tasks.run`). Clusters are grown in the order of the samples: a text joins the first cluster
all of whose texts say the same as it.

    agreement          share of the other samples in the cluster of the first
    semantic entropy   H = -sum over clusters c of (n_c / n) log(n_c / n)

As a confidence stands 1 - H / log n: 1 where all say the same, 0 where no two do. This is the discrete form
of semantic entropy, in which samples count alike (Farquhar et al., Nature 630, 2024). Words alone take "not"
for a word like any other.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence

Alike = Callable[[str, str], bool]
_WORDS = re.compile(r"\w+")


def agreements(texts: Sequence[str], alike: Alike) -> dict[str, float]:
    """The two confidences of at least two samples, by name.

    >>> found = agreements(["It is four.", "it is four", "Five"], by_words(1.0))
    >>> {name: round(value, 4) for name, value in found.items()}
    {'agreement': 0.5, 'semantic entropy': 0.4206}
    """
    labels = clusters(texts, alike)
    counts = Counter(labels)
    n = len(labels)
    entropy = -sum(count / n * math.log(count / n) for count in counts.values())
    return {
        "agreement": (counts[labels[0]] - 1) / (n - 1),
        "semantic entropy": min(1.0, max(0.0, 1 - entropy / math.log(n))),
    }


def by_words(bound: float) -> Alike:
    """Whether the F1 of two texts' words is at least a bound."""

    def alike(one: str, other: str) -> bool:
        return _f1(_words(one), _words(other)) >= bound

    return alike


def clusters(texts: Sequence[str], alike: Alike) -> list[int]:
    """The number of each text's cluster, in the order in which clusters begin."""
    grown: list[list[int]] = []
    labels = []
    for place, own in enumerate(texts):
        label = next(
            (n for n, members in enumerate(grown) if all(alike(texts[m], own) for m in members)),
            len(grown),
        )
        if label == len(grown):
            grown.append([])
        grown[label].append(place)
        labels.append(label)
    return labels


def _words(text: str) -> Counter[str]:
    return Counter(_WORDS.findall(text.casefold()))


def _f1(one: Counter[str], other: Counter[str]) -> float:
    """2 |A and B| / (|A| + |B|) of words with their counts; 1 of two empty texts."""
    total = one.total() + other.total()
    return 2 * (one & other).total() / total if total else 1.0
