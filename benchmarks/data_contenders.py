"""Who finds near-duplicates: ours and others, each as a function from a file of documents to pairs of ids.

Everybody reads the same lines of JSON and is asked for pairs with a Jaccard similarity of at least 0.7 over
runs of five words. Peers are used as their documentation does: MinHash of 128 permutations, an index of 16
bands of 8 rows, and their own estimate of the similarity to choose among candidates.

This module runs in the peers' interpreter too, so it imports nothing but what Python brings.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

THRESHOLD = 0.7
SHINGLE_WORDS = 5
PERMUTATIONS, BANDS, ROWS = 128, 16, 8

Pair = tuple[int, int]


class Contender(NamedTuple):
    """One of those who are compared."""

    title: str
    find: Callable[[Path], Iterable[Pair]]
    package: str
    """What has to be installed."""

    def version(self) -> str | None:
        """None where it is not installed."""
        try:
            return metadata.version(self.package)
        except metadata.PackageNotFoundError:
            return None


def documents(path: Path) -> Iterator[tuple[int, str]]:
    """Id and text of each line."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            yield row["id"], row["text"]


def shingles(text: str) -> list[str]:
    """Runs of words, as a user of the peers makes them."""
    words = re.findall(r"\w+", text.lower())
    return [" ".join(words[i : i + SHINGLE_WORDS]) for i in range(max(1, len(words) - SHINGLE_WORDS + 1))]


def ours(path: Path) -> Iterable[Pair]:
    """25 bands of 5 rows, then the sets themselves."""
    from gyrocompass.data.curate.near_duplicates import near_duplicates

    ids: list[str] = []

    def texts() -> Iterator[str]:
        for number, text in documents(path):
            ids.append(str(number))
            yield text

    found = near_duplicates(texts())
    return [(int(ids[int(one)]), int(ids[int(other)])) for one, other in found.every_pair()]


def datasketch(path: Path) -> Iterable[Pair]:
    """`MinHashLSH` beside a dictionary of the hashes."""
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(num_perm=PERMUTATIONS, params=(BANDS, ROWS))
    kept: dict[int, Any] = {}
    for number, text in documents(path):
        kept[number] = MinHash(num_perm=PERMUTATIONS)
        kept[number].update_batch([shingle.encode() for shingle in shingles(text)])
        for other in index.query(kept[number]):
            if kept[number].jaccard(kept[other]) >= THRESHOLD:
                yield other, number
        index.insert(number, kept[number], check_duplication=False)


def rensa(path: Path) -> Iterable[Pair]:
    """`RMinHashLSH` beside a dictionary of the hashes."""
    from rensa import RMinHash, RMinHashLSH

    index = RMinHashLSH(threshold=THRESHOLD, num_perm=PERMUTATIONS, num_bands=BANDS)
    kept: dict[int, Any] = {}
    for number, text in documents(path):
        kept[number] = RMinHash(num_perm=PERMUTATIONS, seed=1)
        kept[number].update(shingles(text))
        for other in index.query(kept[number]):
            if kept[number].jaccard(kept[other]) >= THRESHOLD:
                yield other, number
        index.insert(number, kept[number])


CONTENDERS = {
    "ours": Contender("ours: 25 x 5, then exact", ours, "numpy"),
    "rensa": Contender("rensa: 16 x 8, estimate", rensa, "rensa"),
    "datasketch": Contender("datasketch: 16 x 8, estimate", datasketch, "datasketch"),
}
