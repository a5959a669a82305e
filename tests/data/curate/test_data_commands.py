"""`gyro data build`, `why`, `diff` and `gyro forget`, as a user types them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import curate_steps as curate_steps  # its steps are those of the builds here
import pyarrow.parquet as pq
import pytest

from gyrocompass.core.store import Store
from gyrocompass.data.curate import parts
from gyrocompass.data.curate.dataset import LEDGER, read_leaves
from gyrocompass.data.curate.merkle import Proof, holds, prove
from gyrocompass.data.curate.versions import open_dataset, read_facts
from gyrocompass.data.document import read_documents

Run = Callable[..., tuple[int, str, str]]

BUILD = """
name: notes
sources:
  - files: {path: notes, slice: prose/notes, licence: MIT}
  - jsonl: {path: lines.jsonl, slice: chat}
max_quarantined_share: 0.5
steps: [count_words, same_start]
rules:
  - drop: {column: count_words.words, below: {prose: 4, "*": 1}, partner: same_start.cluster}
  - keep_one: {column: same_start.cluster, prefer: [{column: count_words.words, order: highest}]}
  - mask: {column: count_words.longest, slices: [chat]}
shard_bytes: 100
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GYRO_STORE", str(tmp_path / "store"))
    (tmp_path / "notes").mkdir()
    for number in range(12):
        (tmp_path / "notes" / f"{number}.md").write_text(f"n{number} " + "word " * (number % 6 + 1))
    (tmp_path / "notes" / "twin.md").write_text("n5 and nothing else here at all and on")
    (tmp_path / "notes" / "broken.md").write_bytes(b"fine so far\n\xff\xfe")
    (tmp_path / "lines.jsonl").write_text('{"text": "hello everybody"}\n{"text": 3}\n')
    (tmp_path / "build.yaml").write_text(BUILD)
    return tmp_path


def test_a_build_ends_with_a_table_and_its_root(place: Path, gyro: Run) -> None:
    code, out, err = gyro("data", "build", "build.yaml", "--workers", 1)
    assert code == 0, err
    for said in (
        "read",
        "14",
        "quarantined while reading",
        "count_words.words < its slice's",
        "kept",
        "prose/notes",
    ):
        assert said in out
    code, out, err = gyro("data", "build", "build.yaml", "--workers", 1, "--json")
    facts = json.loads(out)
    assert facts["counts"]["documents"] == 14 - facts["counts"]["dropped"] and facts["root"] in json.dumps(
        facts
    )
    assert err == ""
    assert [line["left"] for line in facts["funnel"] if line["what"] == "kept"] == [
        facts["counts"]["documents"]
    ]


def test_why_tells_each_fate_with_its_reason(place: Path, gyro: Run) -> None:
    gyro("data", "build", "build.yaml", "--workers", 1)
    _, out, _ = gyro("data", "why", "notes/0.md")
    assert "dropped by the rule: count_words.words < its slice's" in out
    assert "count_words.words is 2, the threshold 4" in out and "<- decided" in out
    _, out, _ = gyro("data", "why", "5.md")
    assert "another one of its same_start.cluster" in out and "it lost against" in out and "twin.md" in out
    _, out, _ = gyro("data", "why", "twin.md")
    assert out.startswith("kept in dataset-") and "count_words.longest: 1 spans: longest" in out
    _, out, _ = gyro("data", "why", "lines.jsonl:1")
    assert out.startswith("covered in") and "1 longest" in out
    _, out, _ = gyro("data", "why", "broken.md")
    assert out.startswith("quarantined in") and "not UTF-8" in out
    code, out, _ = gyro("data", "why", "twin.md", "--json")
    said = json.loads(out)
    assert code == 0 and said["status"] == "kept" and said["notes"]["count_words.words"] == 9
    code, _, err = gyro("data", "why", "tvin.md")
    assert code == 2 and "no document of this name was read" in err
    code, _, err = gyro("data", "why", ".md")
    assert code == 2
    new_id = next(
        d for d in read_documents(open_dataset(Store(place / "store")).path) if d.slice == "chat"
    ).id
    assert gyro("data", "why", new_id)[1].startswith("covered in"), "it is found by what it became, too"


def test_diff_says_what_came_went_and_changed_and_why(place: Path, gyro: Run) -> None:
    gyro("data", "build", "build.yaml", "--workers", 1)
    before = open_dataset(Store(place / "store")).id
    (place / "notes" / "4.md").write_text("n4 says something new and long")
    (place / "notes" / "10.md").unlink()
    (place / "notes" / "99.md").write_text("n99 is one more of these")
    (place / "build.yaml").write_text(BUILD.replace("prose: 4", "prose: 6"))
    gyro("data", "build", "build.yaml", "--workers", 1)
    code, out, _ = gyro("data", "diff", before, "notes")
    assert code == 0 and "1 added" in out and "1 changed" in out and "4.md (prose/notes) -> " in out
    assert "9.md (prose/notes): count_words.words < its slice's (it is 5)" in out
    assert "prose/notes" in out
    said = json.loads(gyro("data", "diff", before, "notes", "--json")[1])
    assert not said["same"] and said["changed"][0]["fields"] == ["content"]
    assert {row["path"] for row in said["added"]} == {"notes/99.md"}
    assert "notes/10.md" in {row["path"] for row in said["removed"]}
    code, out, _ = gyro("data", "diff", "notes", "notes")
    assert code == 0 and "the same documents" in out
    code, _, err = gyro("data", "diff", "nots", "notes")
    assert code == 2 and "did you mean notes" in err


def test_forget_takes_a_document_out_of_everything_that_is_stored(place: Path, gyro: Run) -> None:
    gyro("data", "build", "build.yaml", "--workers", 1)
    store = Store(place / "store")
    before = open_dataset(store)
    twin = next(d for d in read_documents(before.path) if d.path == "notes/twin.md")
    (place / "notes" / "copy.rst").write_text(twin.text)  # the same content elsewhere, read later
    code, out, err = gyro("forget", "twin.md", "--dry-run")
    assert code == 0 and "holds it" in out and "nothing was changed" in out, err
    assert open_dataset(store).id == before.id
    code, out, err = gyro("forget", "twin.md", "--workers", 1, "--reason", "asked for")
    assert code == 0, err
    assert "proved absent" in out and before.id in out
    after = open_dataset(store)
    assert after.id != before.id and not before.path.exists()
    assert twin.id not in {document.id for document in read_documents(after.path)}
    # What lost against it may stay now.
    assert "notes/5.md" in {document.path for document in read_documents(after.path)}
    root = bytes.fromhex(read_facts(after.path)["root"])
    assert holds(prove(read_leaves(after.path), twin.id), root)
    assert not isinstance(prove(read_leaves(after.path), twin.id), Proof)
    remark = (place / "store" / "opt-out.txt").read_text()
    assert twin.id in remark and twin.content_hash in remark and "asked for" in remark
    for path in (place / "store").rglob("*"):
        assert not path.is_file() or b"nothing else here at all" not in path.read_bytes(), path
    held = [path for path in (place / "store").rglob("*.parquet") if "text" in pq.read_schema(path).names]
    for path in held:
        texts = pq.read_table(path, columns=["text"])["text"].to_pylist()
        assert not any("nothing else here at all" in text for text in texts), path
    # No later build reads it, or its copy, even though both are still in the folder.
    gyro("data", "build", "build.yaml", "--workers", 1)
    newest = open_dataset(store)
    assert {"notes/twin.md", "notes/copy.rst"}.isdisjoint(d.path for d in read_documents(newest.path))
    assert "notes/twin.md" not in pq.read_table(newest.path / LEDGER)["path"].to_pylist()


def test_forgetting_comes_to_the_build_that_never_read_it(place: Path, gyro: Run) -> None:
    gyro("data", "build", "build.yaml", "--workers", 1)
    gyro("forget", "twin.md", "--workers", 1)
    forgotten = read_facts(open_dataset(Store(place / "store")).path)["root"]
    (place / "notes" / "twin.md").unlink()
    gyro("data", "build", "build.yaml", "--workers", 1, "--store", place / "fresh")
    assert read_facts(open_dataset(Store(place / "fresh")).path)["root"] == forgotten


def test_forget_refuses_what_it_cannot_mean(place: Path, gyro: Run) -> None:
    code, _, err = gyro("forget", "twin.md")
    assert code == 2 and "no store here" in err
    gyro("data", "build", "build.yaml", "--workers", 1)
    code, _, err = gyro("forget", "nobody.md")
    assert code == 2 and "no artifact and no document" in err
    code, _, err = gyro("forget", open_dataset(Store(place / "store")).id)
    assert code == 2 and "is an artifact" in err


def test_a_full_disk_is_an_error_for_users_and_the_build_goes_on_after_it(
    place: Path, gyro: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(table: object, where: object, **options: object) -> None:
        raise OSError(28, os.strerror(28), str(where))

    with monkeypatch.context() as patched:
        patched.setattr(parts.pq, "write_table", full)
        code, _, err = gyro("data", "build", "build.yaml", "--workers", 1)
    assert code == 1 and "No space left on device" in err and "where:" in err
    assert gyro("data", "build", "build.yaml", "--workers", 1)[0] == 0
    assert not any((place / "store" / "work").iterdir())


def test_mistakes_in_a_build_are_told_by_line(place: Path, gyro: Run) -> None:
    (place / "build.yaml").write_text(BUILD.replace("steps: [count_words,", "steps: [count_wrods,"))
    code, _, err = gyro("data", "build", "build.yaml")
    assert code == 2
    assert "build.yaml:7: steps.0: there is no step 'count_wrods'; did you mean count_words?" in err


def test_too_many_unreadable_records_fail_the_build(place: Path, gyro: Run) -> None:
    (place / "build.yaml").write_text(BUILD.replace("max_quarantined_share: 0.5", ""))
    code, _, err = gyro("data", "build", "build.yaml")
    assert code == 2 and "broken.md:2: not UTF-8" in err and "cannot be used" in err
