"""What measures receive instead of a model that writes: a callable from prompts to what it wrote.

    Generate = Callable[[Sequence[str], Writing], list[list[Written]]]      one list of samples per prompt

`gyrocompass.model.write.writer` makes one from a model, `served.served_generate` one from a server. `echo` is
the fake that tests use.

Shape legend: N tokens of one text that was written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Writing(NamedTuple):
    """How much is to be written, and how it is drawn."""

    max_new_tokens: int = 64
    samples: int = 1
    temperature: float = 0.0
    """0: the likeliest token each time."""
    stop: tuple[str, ...] = ()
    """A text ends before the first of these."""
    chat: bool = False
    """Whether prompts are what a user says, to be put into the chat template."""
    seed: int = 0
    top_p: float = 1.0
    top_k: int | None = None


class Written(NamedTuple):
    """A text with what the model said of its tokens before any temperature: the untouched distribution."""

    text: str
    logprob_N: NDArray[np.float64]
    """log p of each token, nats, the one that ended it included where that is told."""
    entropy_N: NDArray[np.float64]
    """Of the distribution that each was drawn from, nats; NaN where that is not told."""
    finished: bool
    """Whether it ended by itself or at a stop, rather than at the limit."""


Generate = Callable[[Sequence[str], Writing], list[list[Written]]]


def cut_at(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """The text before the first stop, and whether there was one.

    >>> cut_at("one. two", [".", " t"])
    ('one', True)
    """
    ends = [place for place in (text.find(mark) for mark in stop) if place >= 0]
    return (text[: min(ends)], True) if ends else (text, False)


def echo(prompts: Sequence[str], writing: Writing) -> list[list[Written]]:
    """A fake: writes the last line of each prompt again, each of its bytes as likely as any."""
    found = []
    for prompt in prompts:
        text, _ = cut_at(prompt.rsplit("\n", 1)[-1], writing.stop)
        nats_N = np.full(len(text.encode()) + 1, np.log(256))
        found.append([Written(text, -nats_N, nats_N, True)] * writing.samples)
    return found
