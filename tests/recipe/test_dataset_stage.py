"""Data sets in recipes: built inside one, or read by one, with their documents as they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from gyrocompass.core.lineage import walk
from gyrocompass.core.store import Store
from gyrocompass.data.curate.versions import open_dataset
from gyrocompass.data.document import read_documents

Run = Callable[..., tuple[int, str, str]]

BUILD = """
name: notes
sources: [{files: {path: notes, licence: MIT}}]
rules: [{drop: {column: n_bytes, below: 20}}]
"""

RECIPE = """
name: curated
tracking: {mlflow: null}
stages:
  built: {kind: curated, build: {name: inside, sources: [{files: {path: notes}}], rules: [{drop: {column:
  n_bytes, below: 20}}]}}
  read: {kind: documents, sources: [{dataset: {path: store/datasets/notes.json}}]}
  plain: {kind: documents, sources: [{files: {path: notes}}]}
  train: {kind: split, documents: built, side: train}
  tokenizer: {kind: tokenizer, documents: train, vocabulary_size: 300}
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GYRO_STORE", str(tmp_path / "store"))
    (tmp_path / "notes").mkdir()
    for number in range(12):
        (tmp_path / "notes" / f"{number}.md").write_text(f"note {number}: " + "word " * number)
    (tmp_path / "build.yaml").write_text(BUILD)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def artifacts_of(place: Path) -> dict[str, str]:
    record = json.loads((place / "store" / "runs" / "curated" / "run.json").read_text())
    return {stage["name"]: stage["artifact"] for stage in record["stages"]}


def test_documents_of_a_data_set_keep_their_ids_and_their_lineage(place: Path, gyro: Run) -> None:
    assert gyro("data", "build", "build.yaml", "--workers", 1)[0] == 0
    code, _, err = gyro("run", "recipe.yaml")
    assert code == 0, err
    store = Store(place / "store")
    dataset, made = open_dataset(store, "notes"), artifacts_of(place)
    kept = list(read_documents(dataset.path))
    assert 0 < len(kept) < 12 and all(document.n_bytes >= 20 for document in kept)
    assert list(read_documents(store.open(made["read"]).path)) == kept
    assert store.open(made["read"]).manifest.parents == {"dataset.0": dataset.id}
    inside = list(read_documents(store.open(made["built"]).path))
    assert [document.text for document in inside] == [document.text for document in kept]
    assert store.open(made["built"]).manifest.parents == {"dataset": open_dataset(store, "inside").id}
    assert {made["read"], dataset.id} <= walk(store, kept[0].id).saw
    # Another run finds everything.
    assert f"{len(made)} of them reused" in gyro("run", "recipe.yaml")[1]


def test_what_was_forgotten_is_in_no_stage_of_the_next_run(place: Path, gyro: Run) -> None:
    gyro("data", "build", "build.yaml", "--workers", 1)
    gyro("run", "recipe.yaml")
    before = artifacts_of(place)
    store = Store(place / "store")
    document = next(d for d in read_documents(store.open(before["plain"]).path) if d.path == "notes/11.md")
    code, out, err = gyro("forget", "notes/11.md", "--workers", 1)
    assert code == 0, err
    assert before["tokenizer"] in out and "still to be trained again" in out
    assert not (store.root / "artifacts" / before["plain"]).exists()
    assert gyro("run", "recipe.yaml")[0] == 0
    after = artifacts_of(place)
    for name in ("plain", "built", "read", "train"):
        texts = [d.text for d in read_documents(store.open(after[name]).path)]
        assert document.text not in texts and texts, name
    assert after["tokenizer"] != before["tokenizer"]


def test_a_missing_data_set_is_named(place: Path, gyro: Run) -> None:
    code, _, err = gyro("run", "recipe.yaml")
    assert code == 2 and "there is no data set here" in err and "store/datasets/notes.json" in err
