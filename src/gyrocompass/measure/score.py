"""What measures receive instead of a model: a callable from texts to the log-probabilities of their tokens.

    Score = Callable[[Iterable[str]], Iterator[TokenScores]]

`gyrocompass.model.score.scorer` makes one from a model, `served.served_score` one from a server. `uniform` is
the fake that tests use: its numbers are known in closed form.

Shape legend: N tokens of one text that are predicted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gyrocompass.measure.ledger import Ledger


class TokenScores(NamedTuple):
    """What a model says of the tokens of one text, in order; the text's end is the last of them."""

    id_N: NDArray[np.int64]
    byte_N: NDArray[np.int64]
    """Bytes of text each stands for; they add up to the text's."""
    logprob_N: NDArray[np.float64]
    """log p, nats."""
    entropy_N: NDArray[np.float64]
    """Of the distribution that predicted it, nats; NaN where that is not told."""
    rank_N: NDArray[np.int64]
    """How many tokens scored above it; 0 = top-1."""


Score = Callable[[Iterable[str]], Iterator[TokenScores]]


class ScoredText(NamedTuple):
    """A text to be measured, with its tags."""

    document: str
    slice: str
    source: str
    text: str
    group: str = ""
    """What was drawn as one with other texts; "": a group of its own."""


def tally(score: Score, texts: Iterable[ScoredText]) -> Ledger:
    """The ledger of texts under a score: by slice, source, document and group.

    >>> ledger = tally(uniform, [ScoredText("a", "prose", "files", "abc")])
    >>> round(ledger.total.value / ledger.total.bytes / math.log(2), 6)
    8.0
    """
    ledger = Ledger()
    kept: list[ScoredText] = []

    def read() -> Iterator[str]:
        for text in texts:
            kept.append(text)
            yield text.text

    for scores in score(read()):
        text = kept.pop(0)
        every_N = np.zeros(len(scores.id_N), dtype=np.int64)
        ledger.add_tokens(
            {
                "slice": (every_N, [text.slice]),
                "source": (every_N, [text.source]),
                "document": (every_N, [text.document]),
                "group": (every_N, [text.group or text.document]),
            },
            -scores.logprob_N,
            byte_N=scores.byte_N,
            top1_N=scores.rank_N == 0,
            entropy_N=None if np.isnan(scores.entropy_N).any() else scores.entropy_N,
        )
    assert not kept, "a score answers once for each text"
    return ledger


def uniform(texts: Iterable[str]) -> Iterator[TokenScores]:
    """A fake score: every byte is a token, and each of the 256 is as likely: exactly 8 bits per byte."""
    for text in texts:
        id_N = np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)
        one_N = np.ones_like(id_N)
        nats_N = np.full(len(id_N), math.log(256))
        yield TokenScores(id_N, one_N, -nats_N, nats_N, 0 * one_N)
