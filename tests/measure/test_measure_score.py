"""Scores without a model, and the table of slices."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator

import pytest
from rich.console import Console

from gyrocompass.core.errors import GyroError
from gyrocompass.measure.intervals import slice_scores
from gyrocompass.measure.score import ScoredText, TokenScores, tally, uniform
from gyrocompass.measure.table import NOTE, print_scores

TEXTS = [
    ScoredText("a", "code", "files", "x = 1"),
    ScoredText("b", "code", "files", "é"),
    ScoredText("c", "prose", "files", "words"),
    ScoredText("d", "prose", "files", ""),
]


def test_uniform_bytes_have_eight_bits_each() -> None:
    ledger = tally(uniform, TEXTS)
    assert ledger.total.bytes == ledger.total.count == 12
    code, prose, total = slice_scores(ledger)
    assert (code.documents, prose.documents, total.documents) == (2, 1, 3)  # an empty text has no token
    for score in (code, total):
        assert score.bits_per_byte == pytest.approx(8.0)
        assert score.perplexity == pytest.approx(256.0)
        assert score.bits_per_byte_low == pytest.approx(score.bits_per_byte_high)


def test_a_score_may_read_ahead_or_not() -> None:
    def ahead(texts: Iterable[str]) -> Iterator[TokenScores]:
        return uniform(list(texts))

    assert tally(ahead, TEXTS) == tally(uniform, TEXTS)


def test_a_nan_names_the_text() -> None:
    def broken(texts: Iterable[str]) -> Iterator[TokenScores]:
        for scores in uniform(texts):
            yield scores._replace(logprob_N=scores.logprob_N * math.nan)

    with pytest.raises(GyroError, match="document a"):
        tally(broken, TEXTS)


def printed(*texts: ScoredText, width: int = 160) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_scores(slice_scores(tally(uniform, texts)), console, "held-out")
    return console.file.getvalue()


def test_the_table_shows_counts_figures_and_intervals() -> None:
    text = printed(*TEXTS)
    for part in (
        "held-out",
        "code",
        "prose",
        "total",
        "12",
        "5.545 [5.545, 5.545]",
        "256.0",
        "8.000 [\N{EN DASH}]",
        "100.0%",
    ):
        assert part in text
    assert printed().count("total") == 0


def test_at_80_columns_nothing_is_lost() -> None:
    """A table for each measure, with every slice, interval and count in one line."""
    texts = [text._replace(slice=f"prose/{text.slice}-of-some-name") for text in TEXTS]
    lines = printed(*texts, width=80).splitlines()
    assert max(map(len, lines)) <= 80 and not any("\N{HORIZONTAL ELLIPSIS}" in line for line in lines)
    for figure in ("5.545 [5.545, 5.545]", "8.000 [8.000, 8.000]", "256.0 [256.0, 256.0]"):
        (line,) = (line for line in lines if figure in line and line.startswith("prose/code-of-some-name"))
        assert line.split()[-3:] == ["2", "2", "7"]
    assert lines[-1] == NOTE


def test_names_from_the_data_are_not_markup() -> None:
    names = ["[/x]", "[red]", "a/very/long/name/" * 6]
    texts = [ScoredText(name, name, "files", "abc") for name in names]
    for width in (80, 300):
        text = printed(*texts, width=width)
        assert "[/x]" in text and "[red]" in text
    assert names[2] in printed(*texts, width=300)


def test_texts_of_a_group_are_one_cluster() -> None:
    texts = [ScoredText(str(k), "code", "files", "ab" * (k + 1), group=f"file-{k // 2}") for k in range(6)]
    code, _ = slice_scores(tally(uniform, texts))
    assert (code.documents, code.groups) == (6, 3)
