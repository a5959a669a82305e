"""A model that knows a text by heart is found out; one that does not is left alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gyrocompass.core.errors import BadInput
from gyrocompass.measure.generate import Writing, Written
from gyrocompass.measure.memorisation import drawn_like, exposure, exposures, read_canaries, verbatim
from gyrocompass.measure.score import TokenScores

TEXT = "In the beginning there was a text that everybody knew by heart and could recite."


def fond_of(known: str) -> object:
    def score(pairs: Iterable[tuple[str, str]], *, chat: bool = False) -> Iterator[TokenScores]:
        for _, text in pairs:
            nats = np.array([-1.0 if text == known else -2.0])
            yield TokenScores(np.zeros(1, np.int64), np.ones(1, np.int64), nats, nats, np.zeros(1, np.int64))

    return score


def parrot(prompts: Sequence[str], writing: Writing) -> list[list[Written]]:
    ends = [
        TEXT[TEXT.index(prompt) + len(prompt) :] if prompt in TEXT else "something else" for prompt in prompts
    ]
    return [[Written(end[:30], np.zeros(1), np.zeros(1), False)] for end in ends]


def test_a_canary_known_by_heart_has_all_the_bits() -> None:
    others = [f"code {number}" for number in range(127)]
    found = exposure(fond_of("code x"), "the ", "code x", others)  # type: ignore[arg-type]
    assert (found.bits, found.rank, found.most) == (7.0, 1, 7.0)
    unknown = exposure(fond_of("else"), "the ", "code x", others)  # type: ignore[arg-type]
    assert (unknown.bits, unknown.rank) == (0.0, 128)
    with pytest.raises(BadInput, match="might have been planted"):
        exposure(fond_of("x"), "the ", "code x", ["code x"])  # type: ignore[arg-type]


def test_what_is_recited_is_counted() -> None:
    other = "another text that nobody ever saw, of about as many characters as the first"
    known, unknown = verbatim(parrot, [("a", TEXT), ("b", other), ("c", "short")], prompt_characters=20)
    assert known.characters == known.of == 30 and known.longest == TEXT[20:50]
    assert unknown.characters == 0 and unknown.document == "b"


def test_texts_of_one_form_are_drawn() -> None:
    others = drawn_like("id 07-Ab", 200)
    assert len(set(others)) == 200 and others == drawn_like("id 07-Ab", 200)
    assert all(re.fullmatch(r"[a-z]{2} \d\d-[A-Z][a-z]", one) and one != "id 07-Ab" for one in others)


def test_canaries_are_read_and_ranked(tmp_path: Path) -> None:
    path = tmp_path / "canaries.jsonl"
    path.write_text('{"context": "a", "canary": "7"}\n{"context": "b", "canary": "..."}\n')
    with pytest.raises(BadInput, match="without a letter or a digit"):
        read_canaries(path)
    path.write_text('{"context": "a", "canary": "7"}')

    def score(pairs: Any, **_: Any) -> Any:
        for _, text in pairs:
            n = np.array([0.0 if text == "7" else -1.0])
            yield TokenScores(np.zeros(1, np.int64), np.zeros(1, np.int64), n, n, np.zeros(1, np.int64))

    ((canary, found),) = exposures(score, read_canaries(path), 10)
    assert canary.context == "a" and (found.rank, found.candidates) == (1, 10)
