"""The card of a data set, its exports and its report: every figure against what was planted."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planted_dataset import EMAIL, HOSTILE, SECRET, build, build_from_config, records
from rich.console import Console

from gyrocompass.cli.main import main
from gyrocompass.core.store import Store
from gyrocompass.data.curate.card import (
    Counted,
    DataCard,
    Finding,
    Parts,
    card_markdown,
    escaped,
    read_card,
)
from gyrocompass.data.curate.croissant import croissant
from gyrocompass.data.curate.inspection import EXCERPT, Inspection, excerpt, inspect
from gyrocompass.data.curate.training_summary import training_summary
from gyrocompass.data.document import read_documents
from gyrocompass.data.tokens import TokenRow, write_tokens
from gyrocompass.recipe.data_report import print_inspection, write_data_report


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Parts, DataCard]:
    store, parts = build(tmp_path_factory.mktemp("planted"))
    return store, parts, read_card(store, parts)


@pytest.fixture(scope="module")
def seen(planted: tuple[Store, Parts, DataCard]) -> Inspection:
    return inspect(planted[1], samples=40)


# --- the card ---


def test_counts_add_up_to_what_is_there(planted: tuple[Store, Parts, DataCard]) -> None:
    _, parts, card = planted
    kept = list(read_documents(parts.dataset.path))
    assert card.read_documents == len(records()) == 17
    assert card.total == Counted("total", len(kept), sum(d.n_bytes for d in kept), None)
    for rows in card.by.values():
        assert sum(row.documents for row in rows) == card.total.documents
        assert sum(row.bytes for row in rows) == card.total.bytes
    assert {row.name: row.documents for row in card.by["slice"]} == {
        "prose/books": 9,
        "prose/mail": 1,
        "code": 2,
    }
    assert {row.name: row.documents for row in card.by["language"]} == {"en": 8, "de": 1, "unknown": 3}
    assert {row.name for row in card.by["licence"]} == {"CC-BY-SA-4.0", "MIT OR Apache-2.0", "unknown"}
    assert sum(row.documents for row in card.dropped) == card.read_documents - card.total.documents


def test_why_what_is_not_there_is_not(planted: tuple[Store, Parts, DataCard]) -> None:
    _, _, card = planted
    short = len(f"tiny {EMAIL}")
    assert [(each.title, each.documents) for each in card.dropped] == [
        ("n_bytes < 25", 1),
        ("contamination.spans", 1),
        ("another one of its planted_clusters.cluster", 3),
    ]
    assert card.dropped[0].bytes == short and card.dropped[0].example.endswith("#short")
    assert [(each.reason.split(":")[0], each.records) for each in card.lost] == [
        (
            "none of text, messages, prompt + completion, prompt + steps, prompt + chosen + rejected; fields",
            1,
        ),
        ("not JSON", 1),
    ]
    assert re.search(r"planted\.jsonl:18, byte [\d,]+$", card.lost[0].example)
    assert card.lost[0].bytes == len('{"txt": "no text"}\n')
    assert card.lost_share == pytest.approx(2 / 19)
    assert card.skipped == {"empty line": 1}


def test_findings_are_counted_by_kind_and_by_what_became_of_them(
    planted: tuple[Store, Parts, DataCard],
) -> None:
    _, _, card = planted
    found = {(each.step, each.kind): each for each in card.findings}
    assert found["personal", "email"] == Finding("personal", "personal", "email", 3, 4, 2, 3, 3)
    assert found["secrets", "secret.password"] == Finding(
        "secrets", "secrets", "secret.password", 1, 1, 1, 1, 0
    )
    assert found["contamination", "substring:quiz"] == Finding(
        "contamination", "contamination", "substring:quiz", 1, 1, 0, 0, 0
    )
    assert found["passages", "repeated"].topic == ""
    assert found["passages", "repeated"].spans == sum(n + 2 for n in range(8))


def test_tokens_come_from_what_was_made_of_it(tmp_path: Path) -> None:
    store, parts = build(tmp_path)
    kept = list(read_documents(parts.dataset.path))
    with store.create("key", "split", parents={"documents": parts.dataset}, recipe={}) as middle:
        (middle.path / "x").write_text("x")
    with store.create("tokens-key", "tokens", parents={"documents": middle.artifact}, recipe={}) as draft:
        write_tokens(
            draft.path,
            (TokenRow(d.id, d.slice, d.source, [1] * 5, [1] * 5, [1.0] * 5) for d in kept),
        )
    card = read_card(store, parts)
    assert card.total.tokens == 5 * len(kept)
    for rows in card.by.values():
        assert all(row.tokens == 5 * row.documents for row in rows)
    assert f"{5 * len(kept)} tokens" in training_summary(card)


def test_what_steps_find_out_is_counted_beside_what_sources_say(tmp_path: Path) -> None:
    pytest.importorskip("py3langid")
    texts = [
        "Der Kompass zeigt nach Norden, und niemand weiß genau, warum das so bleibt.",
        "The compass points north, and nobody knows exactly why it should stay that way.",
        "Write to ann.huber@posteo.de about the compass, and ask her where the north has gone.",
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    store, parts = build_from_config(
        tmp_path,
        {
            "name": "found",
            "sources": [{"jsonl": {"path": str(tmp_path / "a.jsonl")}}],
            "steps": [{"language": {"as": "tongue"}}, "personal"],
            "rules": [{"mask": {"column": "personal.spans"}}],
        },
    )
    card = read_card(store, parts)
    assert [(row.name, row.documents) for row in card.by["language"]] == [("unknown", 3)]
    found = card.by["language, as tongue finds it"]
    assert {row.name: row.documents for row in found} == {"en": 2, "de": 1}
    assert sum(row.bytes for row in found) == sum(len(text.encode()) for text in texts)
    assert "### By language, as tongue finds it" in card_markdown(card)


# --- exports ---


def test_the_card_as_markdown_escapes_what_it_quotes(planted: tuple[Store, Parts, DataCard]) -> None:
    text = card_markdown(planted[2])
    assert HOSTILE not in text and "&lt;script&gt;" in text
    for heading in (
        "What is in it",
        "What is not in it, and why",
        "Personal data",
        "Secrets",
        "How it was made",
    ):
        assert re.search(rf"^##+ {heading}", text, re.MULTILINE)
    assert "| personal | email | 3 | 4 | 2 | 3 | 3 |" in text
    assert "Could not be read: 10.53% of all records." in text
    assert all(len({line.count(" | ") for line in table}) == 1 for table in tables(text))


def tables(text: str) -> list[list[str]]:
    blocks = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    return [[line for line in block.splitlines() if not set(line) <= set("|-")] for block in blocks]


@given(st.text())
def test_escaped_text_stays_in_its_cell(text: str) -> None:
    line = escaped(text)
    assert "\n" not in line and "<" not in line
    assert not re.search(r"(?<!\\)(?:\\\\)*[|`*]", line)


@pytest.mark.filterwarnings("ignore")  # those of mlcroissant and of what it reads with
def test_croissant_is_valid_and_names_every_file(
    planted: tuple[Store, Parts, DataCard], tmp_path: Path
) -> None:
    mlcroissant = pytest.importorskip("mlcroissant")
    _, parts, card = planted
    metadata = croissant(card, parts.dataset, "https://example.org/planted")
    shutil.copytree(parts.dataset.path, tmp_path / "beside")
    (tmp_path / "beside/croissant.json").write_text(json.dumps(metadata))
    loaded = mlcroissant.Dataset(jsonld=str(tmp_path / "beside/croissant.json"))
    assert not loaded.metadata.ctx.issues.errors and not loaded.metadata.ctx.issues.warnings
    loaded_texts = [row["document/text"].decode() for row in loaded.records("document")]
    assert loaded_texts == [document.text for document in read_documents(parts.dataset.path)]
    files = {each["@id"]: each for each in metadata["distribution"] if each["@type"] == "cr:FileObject"}
    assert set(files) == {name for name in parts.dataset.manifest.files if name.startswith("documents-")}
    for name, entry in files.items():
        assert entry["sha256"] == parts.dataset.manifest.files[name].sha256
    assert set(metadata["license"]) == {
        f"https://spdx.org/licenses/{name}.html" for name in ("CC-BY-SA-4.0", "MIT", "Apache-2.0")
    }
    assert metadata["inLanguage"] == ["en", "de"]


def test_the_training_summary_says_what_it_knows_and_marks_what_it_does_not(
    planted: tuple[Store, Parts, DataCard],
) -> None:
    _, _, card = planted
    text = training_summary(card)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    assert [heading[:2] for heading in headings[1:]] == ["1.", "1.", "1.", "1.", "2.", "3.", "3.", "3.", "3."]
    assert card.root in text and "[for the provider to fill in]" in text
    assert "| personal | email |" in text and HOSTILE not in text
    assert "No document that was found is on an opt-out list" in text
    opted = card._replace(skipped={"opted out": 7, "empty line": 1})
    assert "7 documents on opt-out lists" in training_summary(opted)


# --- the inspection ---


def test_histograms_hold_every_document_that_stays(
    planted: tuple[Store, Parts, DataCard], seen: Inspection
) -> None:
    _, _, card = planted
    assert {name: len(values) for name, values in seen.lengths.by_slice.items()} == {
        row.name: row.documents for row in card.by["slice"]
    }
    (surprisal,) = seen.surprisals
    assert surprisal.name == "planted_surprisal.nats_per_byte"
    values = np.concatenate([*surprisal.by_slice.values()])
    assert len(values) == card.total.documents and values.min() >= 1.0 and values.max() <= 1.6


def test_the_largest_clusters_name_who_stayed(seen: Inspection) -> None:
    (cluster,) = seen.clusters
    assert (cluster.step, cluster.name, cluster.size, cluster.kept) == ("planted_clusters", HOSTILE, 4, 1)
    assert [verdict for _, verdict in cluster.members] == [
        "kept",
        *["dropped: another one of its planted_clusters.cluster"] * 3,
    ]


def test_samples_show_every_verdict_and_hide_what_is_personal(
    planted: tuple[Store, Parts, DataCard], seen: Inspection
) -> None:
    verdicts = {sample.verdict for sample in seen.samples}
    assert {"kept", "covered", "dropped: n_bytes < 25", "dropped: contamination.spans"} <= verdicts
    shown = "".join(piece.text for sample in seen.samples for piece in sample.pieces)
    assert EMAIL not in shown and SECRET not in shown and "[email]" in shown and "[secret.password]" in shown
    revealed = inspect(planted[1], samples=40, reveal=True).samples
    text = "".join(piece.text for sample in revealed for piece in sample.pieces)
    assert EMAIL in text and SECRET in text
    assert [s.id for s in revealed] == [s.id for s in seen.samples]
    few = inspect(planted[1], samples=3).samples
    assert len(few) == 3 and len({sample.slice for sample in few}) > 1
    assert inspect(planted[1], samples=0).samples == ()


span = st.tuples(
    st.integers(0, 60), st.integers(0, 60), st.sampled_from("abc"), st.sampled_from(["", "personal"])
)


@given(st.text("xy\n", max_size=60), st.lists(span, max_size=6))
def test_pieces_of_an_excerpt_are_its_text(text: str, spans: list[tuple[int, int, str, str]]) -> None:
    inside = [(start, min(end, len(text)), kind, topic) for start, end, kind, topic in spans]
    pieces, is_cut = excerpt(text, inside, reveal=True)
    assert "".join(piece.text for piece in pieces) == text and not is_cut
    hidden, _ = excerpt(text, inside, reveal=False)
    for kind in (topic for *_, topic in inside if topic):
        assert kind == "personal"
    letters = sum(
        1
        for at in range(len(text))
        if not any(start <= at < end and topic for start, end, _, topic in inside)
    )
    assert sum(len(piece.text) for piece in hidden if not piece.text.startswith("[")) == letters


def test_an_excerpt_begins_near_the_first_span() -> None:
    text = "line of words\n" * 500
    pieces, is_cut = excerpt(text, [(5000, 5010, "k", "")], reveal=True)
    assert is_cut and sum(len(piece.text) for piece in pieces) == EXCERPT
    assert pieces[0].text.startswith("line") and pieces[1].kinds == ("k",)


# --- the page ---


@pytest.fixture(scope="module")
def page(
    planted: tuple[Store, Parts, DataCard], seen: Inspection, tmp_path_factory: pytest.TempPathFactory
) -> str:
    _, parts, card = planted
    path = write_data_report(parts, card, seen, tmp_path_factory.mktemp("page") / "deep" / "report.html")
    return path.read_text()


def test_the_page_needs_nothing_and_runs_nothing(page: str) -> None:
    assert HOSTILE not in page and "&lt;script&gt;" in page
    assert "<script" not in page and "http://" not in page.replace("http://www.w3.org", "")
    assert not re.search(r"(?:src|href)=\"(?!#)", page)
    assert EMAIL not in page and SECRET not in page
    for drawing in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(drawing)
    assert page.count('<svg class="wide"') == page.count('<svg class="narrow"') == 7
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_the_page_shows_the_figures(page: str, planted: tuple[Store, Parts, DataCard]) -> None:
    _, _, card = planted
    assert card.root in page and card.dataset in page
    text = re.sub(r"<[^>]+>", " ", page)
    for said in (
        "n_bytes &lt; 25",
        "secret.password",
        "planted_clusters",
        "10.5%",
        "nats_per_byte",
        "empty line",
    ):
        assert said in text, said
    assert '<mark class="personal" title="email">[email]</mark>' in page


def test_the_page_is_the_same_again(
    page: str, planted: tuple[Store, Parts, DataCard], tmp_path: Path
) -> None:
    _, parts, card = planted
    again = write_data_report(parts, card, inspect(parts, samples=40), tmp_path / "again.html")
    assert again.read_text() == page


def test_the_terminal_shows_the_same(planted: tuple[Store, Parts, DataCard], seen: Inspection) -> None:
    _, parts, card = planted
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    with console.file:
        print_inspection(parts, card, seen, console)
    text = console.export_text()
    assert "dropped: n_bytes < 25" in text and "secret.password" in text and HOSTILE in text
    assert EMAIL not in text and "[email]" in text


# --- the command ---


def test_commands(
    planted: tuple[Store, Parts, DataCard], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, parts, _ = planted
    where = ["--store", str(store.root)]
    assert main(["data", "inspect", "planted", "--samples", "2", *where]) == 0
    said = capsys.readouterr().out
    report = store.root / "reports" / f"{parts.dataset.id}.html"
    assert report.is_file() and str(report) in said.replace("\n", "")
    assert main(["data", "export", "--format", "croissant", *where]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "planted"
    for name in ("card", "eu-summary"):
        assert (
            main(["data", "export", "planted", "--format", name, "--out", str(tmp_path / name), *where]) == 0
        )
        assert (tmp_path / name).read_text().startswith("# ")
    assert main(["data", "inspect", "plant", *where]) == 2
    assert "did you mean planted?" in capsys.readouterr().err


def test_a_data_set_without_anything_to_tell(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one text"}\n')
    store, parts = build_from_config(
        tmp_path, {"name": "plain", "sources": [{"jsonl": {"path": str(tmp_path / "a.jsonl")}}]}
    )
    card, seen = read_card(store, parts), inspect(parts)
    assert card.dropped == () and card.findings == () and seen.clusters == () and seen.surprisals == ()
    page = write_data_report(parts, card, seen, tmp_path / "r.html").read_text()
    assert "No step of this build measured it." in page and "Everything could be read." in page
    assert "No step looked for it." in card_markdown(card) and "No rule took any." in training_summary(card)
