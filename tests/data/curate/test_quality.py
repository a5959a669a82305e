import re
from collections import Counter
from typing import Any

import pytest
from curate.annotation_cases import batch, check_step
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from gyrocompass.data.curate.quality import CODE, Bounds, Quality
from gyrocompass.data.curate.repetition import Repetition

PIECES = ["the ", "be ", "word ", "Ünï ", "中 ", "1 ", "\n", "\n\n", "...", "…", "• ", "* ", "- ", "#", ".",
          "!", "  ", "\xa0", "\t", "same line again\n", "a b c d e f "]  # fmt: skip
TEXTS = st.lists(st.lists(st.sampled_from(PIECES), max_size=25).map("".join), min_size=1, max_size=4)
WHITE = r"[ \t\n\r\x0b\x0c\x00\x85\xa0]"


def plain_figures(text: str) -> dict[str, float]:
    """The reference: line by line."""
    words = [word for word in re.split(f"{WHITE}+", text) if word]
    lines = [line for raw in text.split("\n") if (line := re.sub(f"^{WHITE}+|{WHITE}+$", "", raw))]
    n, m = max(len(words), 1), max(len(lines), 1)
    symbols = max(text.count("#"), text.count("...") + text.count("…"))
    return {
        "n_words": len(words),
        "n_lines": len(lines),
        "mean_word_length": sum(map(len, words)) / n,
        "symbol_word_ratio": symbols / n if words else 0,
        "bullet_lines": sum(bool(re.match(rf"[*\-+·]({WHITE}|$)|[•‣◦▪]", line)) for line in lines) / m,
        "ellipsis_lines": sum(line.endswith(("...", "…")) for line in lines) / m,
        "letter_words": sum(any(c.isalpha() for c in word) for word in words) / n,
        "terminal_lines": sum(line[-1] in ".!?\"'»)。！？”’…" for line in lines) / m,
        "short_lines": sum(len(line) <= 30 for line in lines) / m,
        "newline_word_ratio": text.count("\n") / n if words else 0,
        "mean_line_length": sum(map(len, lines)) / m,
        "longest_line": max(map(len, lines), default=0),
        "alphanumeric": sum(c.isalnum() for c in text) / max(len(text), 1),
        "longest_word": max(map(len, words), default=0),
        "stop_words": len({"the", "be"} & {w.lower() for w in re.findall(r"[^\W_]+", text)}),
    }


@settings(deadline=None)
@given(TEXTS)
def test_the_figures_are_those_of_the_reference(texts: list[str]) -> None:
    rows = check_step(Quality(), batch(texts)).to_pylist()
    for row, text in zip(rows, texts, strict=True):
        for name, value in plain_figures(text).items():
            assert row[name] == pytest.approx(value, rel=1e-6), (name, text)


def plain_repetition(text: str) -> dict[str, float]:
    """The reference: run by run."""
    lines = [line for raw in text.split("\n") if (line := re.sub(f"^{WHITE}+|{WHITE}+$", "", raw))]
    seen: set[str] = set()
    again = [line in seen or seen.add(line) is not None for line in lines]  # type: ignore[func-returns-value]
    words = [word.lower() for word in re.findall(r"[^\W_]+", text)]
    n_characters = max(sum(map(len, words)), 1)
    figures = {
        "duplicate_lines": sum(again) / max(len(lines), 1),
        "duplicate_line_characters": sum(len(x) for x, y in zip(lines, again, strict=True) if y)
        / max(sum(map(len, lines)), 1),
    }
    for n in (2, 3, 4):
        runs = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
        best = max(((count, sum(map(len, run))) for run, count in runs.items() if count > 1), default=(0, 0))
        figures[f"top_{n}gram"] = best[0] * best[1] / n_characters
    for n in (5, 10):
        known: set[tuple[str, ...]] = set()
        covered: set[int] = set()
        for i in range(len(words) - n + 1):
            run = tuple(words[i : i + n])
            if run in known:
                covered.update(range(i, i + n))
            known.add(run)
        figures[f"duplicate_{n}gram"] = sum(len(words[i]) for i in covered) / n_characters
    return figures


@settings(deadline=None)
@given(TEXTS)
def test_repetition_is_that_of_the_reference(texts: list[str]) -> None:
    rows = check_step(Repetition(), batch(texts)).to_pylist()
    for row, text in zip(rows, texts, strict=True):
        for name, value in plain_repetition(text).items():
            assert row[name] == pytest.approx(value, rel=1e-6), (name, text)


def test_paragraphs_that_stand_twice() -> None:
    text = "One two.\nThree.\n\nFour.\n\n \n\nOne two.\nThree.\n"
    row = Repetition().annotate(batch([text])).to_pylist()[0]
    assert row["duplicate_paragraphs"] == pytest.approx(1 / 3)
    assert row["duplicate_paragraph_characters"] == pytest.approx(15 / 35)


PROSE_TEXT = "It was the best of times, and it was the worst of times, that we have to be with. " * 8
CODE_TEXT = "def f(x):\n    return [y + 1 for y in x if y]\n\n" * 12


def quality(texts: list[str], **columns: Any) -> list[dict[str, Any]]:
    return Quality().annotate(batch(texts, **columns)).to_pylist()


def test_each_slice_has_rules_of_its_own() -> None:
    prose, code, as_prose, chat = quality(
        [PROSE_TEXT, CODE_TEXT, CODE_TEXT, "Sure, thanks!"],
        slice=["prose/a", "code/library", "prose", "chat/x"],
    )
    assert prose["passes"] and code["passes"] and chat["passes"]
    assert not as_prose["passes"] and {"stop_words", "terminal_lines"} <= set(as_prose["broken"])
    assert prose["broken"] == []


def test_stop_words_are_those_of_the_documents_language() -> None:
    german = "Der Hund und die Katze liegen in dem Haus von mir und das ist zu viel mit sich."
    figures = quality([german, german, german], language=["de", None, "python"])
    assert [row["stop_words"] for row in figures] == [9, 0, 0]


def test_the_longest_beginning_of_a_slice_decides() -> None:
    step = Quality(rules={"*": {}, "code": CODE, "code/tests": {"n_words": Bounds(most=1)}})
    assert step.bounds_of("code/tests/unit") == {"n_words": Bounds(most=1)}
    assert step.bounds_of("code/library") == CODE and step.bounds_of("prose") == {} == step.bounds_of("codex")
    assert Quality(rules={"code": CODE}).bounds_of("prose") == {}


def test_a_rule_for_an_unknown_figure_names_the_nearest() -> None:
    with pytest.raises(ValidationError, match="did you mean short_lines"):
        Quality(rules={"*": {"short_line": Bounds(most=1)}})
