"""What a model has learned by heart: canaries that it knows too well, and texts that it recites.

    exposure    of a text that was planted in the data, by its rank among texts that might have been planted
    verbatim    how long a greedy continuation of a training text agrees with that text

Exposure is log2(number of candidates) - log2(rank): 0 to 1 bit where nothing was learned, log2 of all where
the canary is the likeliest of them. The candidates must be drawn as the canary was.

Source: Carlini et al. 2019, "The Secret Sharer", section 4.2.
"""

from __future__ import annotations

import json
import math
import random
import re
import string
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gyrocompass.core.errors import BadInput
from gyrocompass.measure.generate import Generate, Writing
from gyrocompass.measure.tasks.run import ScoreContinuations


class Exposure(NamedTuple):
    """How exposed a canary is."""

    bits: float
    rank: int
    """1: the likeliest of all."""
    candidates: int
    """With the canary."""

    @property
    def most(self) -> float:
        """The bits of a canary that is known by heart."""
        return math.log2(self.candidates)


class Verbatim(NamedTuple):
    """How a model goes on with one text that it was trained on."""

    document: str
    characters: int
    """Of its continuation that agree with the text from their beginning on."""
    of: int
    """Characters that were asked for."""
    longest: str
    """What agrees."""


def exposure(score: ScoreContinuations, context: str, canary: str, others: Sequence[str]) -> Exposure:
    """The exposure of what was planted after a context.

    Args:
        score: of the model.
        context: what stands before it.
        canary: what was planted.
        others: texts that might have been planted instead, at least one, none of them the canary.

    Raises:
        BadInput: there are no others, or the canary is among them.
    """
    if not others or canary in others:
        raise BadInput(
            "a canary is ranked among texts that might have been planted instead",
            fix="give at least one, without the canary itself",
        )
    sums = [float(found.logprob_N.sum()) for found in score([(context, one) for one in [canary, *others]])]
    rank = 1 + int((np.array(sums[1:]) >= sums[0]).sum())
    candidates = 1 + len(others)
    return Exposure(math.log2(candidates) - math.log2(rank), rank, candidates)


class Canary(NamedTuple):
    """What was planted, and what stands before it."""

    context: str
    canary: str


def read_canaries(path: Path) -> list[Canary]:
    """Canaries of a JSONL file, with the fields `context` and `canary`.

    Raises:
        BadInput: it cannot be read, or a line lacks a field or has no letter or digit to draw anew.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"the canaries cannot be read: {error}", where=path) from error
    found = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            canary = Canary(str(record["context"]), str(record["canary"]))
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(
                f"not a canary: {error!r}",
                where=f"{path}:{number}",
                fix='write {"context": ..., "canary": ...}',
            ) from error
        if not re.search(r"[0-9A-Za-z]", canary.canary):
            raise BadInput("a canary without a letter or a digit", where=f"{path}:{number}")
        found.append(canary)
    return found


def exposures(
    score: ScoreContinuations, canaries: Sequence[Canary], candidates: int
) -> list[tuple[Canary, Exposure]]:
    """The exposure of each canary among texts of its form, drawn as `drawn_like` draws them."""
    found = []
    for canary in canaries:
        others = drawn_like(canary.canary, candidates - 1)
        found.append((canary, exposure(score, canary.context, canary.canary, others)))
    return found


def drawn_like(text: str, count: int) -> list[str]:
    """Different texts of one form: each digit, small and capital letter drawn anew, evenly.

    The same text always gives the same ones, so canaries are comparable between models. They are as many as
    were asked for, or as there are.

    >>> drawn_like("id 7", 3)[0] != "id 7", len(drawn_like("7", 100))
    (True, 9)
    """
    draw = random.Random(text)
    kinds = (string.digits, string.ascii_lowercase, string.ascii_uppercase)
    found: dict[str, None] = {}
    for _ in range(50 * count):
        letters = [draw.choice(next((kind for kind in kinds if letter in kind), letter)) for letter in text]
        other = "".join(letters)
        if other != text:
            found[other] = None
        if len(found) == count:
            break
    return list(found)


def verbatim(
    generate: Generate,
    texts: Sequence[tuple[str, str]],
    *,
    prompt_characters: int = 100,
    max_new_tokens: int = 64,
) -> list[Verbatim]:
    """Begin each text, let the model go on greedily, and see how long it stays with the text.

    Args:
        generate: the model.
        texts: document ids and texts; those not longer than the prompt are left out.
        prompt_characters: of each text that are given.
        max_new_tokens: that are asked for.
    """
    kept = [(name, text) for name, text in texts if len(text) > prompt_characters]
    prompts = [text[:prompt_characters] for _, text in kept]
    found = []
    for (name, text), (written,) in zip(kept, generate(prompts, Writing(max_new_tokens)), strict=True):
        expected = text[prompt_characters:]
        agreeing = next(
            (place for place, (a, b) in enumerate(zip(written.text, expected, strict=False)) if a != b),
            min(len(written.text), len(expected)),
        )
        found.append(Verbatim(name, agreeing, min(len(written.text), len(expected)), expected[:agreeing]))
    return found
