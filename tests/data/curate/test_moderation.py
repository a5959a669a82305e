import sys
from collections.abc import Sequence

import pytest
from curate.annotation_cases import batch, check_step
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from gyrocompass.core.errors import BadInput, MissingDependency
from gyrocompass.data.curate import moderation
from gyrocompass.data.curate.moderation import Moderation, TermList
from gyrocompass.data.curate.spans import from_arrow

STEP = Moderation(
    lists={
        "rude": TermList(words=("blast", "go away"), patterns=(r"b[l1]\*+t",)),
        "x": TermList(words=("straße",)),
    }
)


def test_words_phrases_and_patterns_are_found_whole() -> None:
    texts = ["Blast! GO\n\taway, blasted bl**t.", "Die Straße", "nothing", ""]
    rows = check_step(STEP, batch(texts))
    found = [
        [(span.kind, text[span.start : span.end]) for span in spans]
        for text, spans in zip(texts, from_arrow(rows["spans"]), strict=True)
    ]
    assert found == [
        [("rude", "Blast"), ("rude", "GO\n\taway"), ("rude", "bl**t")],
        [("x", "Straße")],
        [],
        [],
    ]
    assert rows["per_1000_rude"].to_pylist() == [pytest.approx(1000 * 3 / 6), 0, 0, 0]
    assert rows["per_1000_x"].to_pylist() == [0, 500, 0, 0]


@settings(deadline=None)
@given(
    st.lists(
        st.lists(st.sampled_from(["blast", "go", "away", " ", "b1**t", "\0", "é", "\n"]), max_size=10).map(
            "".join
        ),
        max_size=4,
    )
)
def test_documents_do_not_see_each_other(texts: list[str]) -> None:
    check_step(STEP, batch(texts))


def test_a_scorer_is_plugged_in(monkeypatch: pytest.MonkeyPatch) -> None:
    def shouting(texts: Sequence[str]) -> list[float]:
        return [sum(map(str.isupper, text)) / max(len(text), 1) for text in texts]

    monkeypatch.setitem(moderation.SCORERS, "shouting", lambda: shouting)
    assert Moderation(scorers=("shouting",)).annotate(batch(["AAbb", "c"]))["score_shouting"].to_pylist() == [
        0.5,
        0,
    ]
    with pytest.raises(BadInput, match="did you mean shouting"):
        Moderation(scorers=("shout",)).annotate(batch(["a"]))


def test_the_list_of_a_package_is_read_as_text() -> None:
    step = Moderation(lists={"profane": TermList(package="better_profanity")})
    rows = check_step(step, batch(["you bastard", "you dear friend"]))
    assert [bool(found) for found in from_arrow(rows["spans"])] == [True, False]
    assert "better_profanity" not in sys.modules


def test_a_package_that_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(moderation.PACKAGES, "no_such_package", "list.txt")
    with pytest.raises(MissingDependency, match="no_such_package"):
        TermList(package="no_such_package").all_words()


@pytest.mark.parametrize(
    ("terms", "reason"),
    [({"words": ("!!",)}, "no letter"), ({"patterns": ("(",)}, "not a regular"), ({"patterns": ("a*",)},
     "everywhere"),
     ({"package": "better_profanty"}, "did you mean better_profanity")],
)  # fmt: skip
def test_lists_that_cannot_work_are_refused(terms: dict[str, tuple[str, ...]], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        TermList.model_validate(terms)
