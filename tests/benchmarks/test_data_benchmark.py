"""The benchmark of curation runs, and what it says of found pairs is what is true; nothing here is timed."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmarks are scripts that import their neighbours."""
    monkeypatch.syspath_prepend(FOLDER)


def test_all_of_it_on_a_small_corpus(tmp_path: Path) -> None:
    command = [sys.executable, str(FOLDER / "data.py"), "--small", "--rounds", "1", "--write", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    page = (tmp_path / "data.md").read_text()
    (ours,) = [line.split(" | ") for line in page.splitlines() if line.startswith("| ours")]
    assert float(ours[6]) >= 0.95 and float(ours[7]) == 1 and int(ours[8].strip(" |")) > 5
    assert "| 1,000 |" in page and "| 2,000 |" in page


def test_a_corpus_that_is_not_there_is_said() -> None:
    command = [sys.executable, str(FOLDER / "data.py"), "--corpus", "nowhere"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2 and "docs.jsonl and truth.tsv" in run.stderr


def test_who_is_absent_has_a_row_that_says_so() -> None:
    data = import_module("data")
    ours = data.Run("ours", "1", 2.0, 2.0, 10**8, data.Measured(1.0, 1.0, 3, 3))
    assert data.cells(data.Run("theirs", None), ours)[:2] == ["theirs", "not installed"]
    assert data.cells(ours, ours)[:3] == ["ours", "2.00", "1.00"]


def test_the_small_corpus_tells_the_truth(tmp_path: Path) -> None:
    import_module("data").small_corpus(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "docs.jsonl").read_text().splitlines()]
    shingles = import_module("data_contenders").shingles
    sets = {row["id"]: set(shingles(row["text"])) for row in rows}
    truth = import_module("data").read_truth(tmp_path)
    assert truth
    for one in sets:
        for other in range(one + 1, len(sets)):
            jaccard = len(sets[one] & sets[other]) / len(sets[one] | sets[other])
            if abs(jaccard - 0.7) > 1e-6:
                assert ((one, other) in truth) == (jaccard >= 0.7)


def test_memory_and_time_are_those_of_the_process() -> None:
    worker = import_module("data_worker")
    before_s, before_bytes = worker.cpu_seconds(), worker.peak_bytes()
    held = bytearray(80 * 2**20)
    assert sum(held[:: 2**12]) == 0
    assert worker.peak_bytes() >= before_bytes and worker.peak_bytes() >= 80 * 2**20
    assert worker.cpu_seconds() >= before_s
