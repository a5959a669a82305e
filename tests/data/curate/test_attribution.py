"""What goes along with a data set: who is to be named, and how much its finders find."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., tuple[int, str, str]]
HEADER = "# SPDX-License-Identifier: MIT\n# Copyright 2020 Anna Abel\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a data set of two slices."""
    folder = tmp_path_factory.mktemp("attribution")
    for name, texts in {"code": [HEADER + "print(1)\n"], "notes": ["One note.", "x"]}.items():
        (folder / name).mkdir()
        for number, text in enumerate(texts):
            (folder / name / f"{number}.{'py' if name == 'code' else 'md'}").write_text(text)
    build = {
        "name": "both",
        "sources": [
            {"files": {"path": str(folder / "code"), "slice": "code"}},
            {"files": {"path": str(folder / "notes"), "slice": "notes", "licence": "CC-BY-4.0"}},
        ],
        "steps": ["licences", {"personal": {"kinds": ["email"]}}],
        "rules": [{"drop": {"column": "n_bytes", "below": 5}}],
    }
    (folder / "build.yaml").write_text(json.dumps(build))
    return folder


def test_who_is_to_be_named(folder: Path, gyro: Run) -> None:
    store = ("--store", folder / "store")
    export = ("data", "export", "both", *store)
    assert gyro("data", "build", folder / "build.yaml", *store)[0] == 0
    code, whole, _ = gyro(*export, "--format", "attribution")
    assert code == 0
    assert "Copyright 2020 Anna Abel" in whole and "0.md" in whole
    assert "1.md" not in whole, "it is not in the data set"
    part = gyro(*export, "--format", "attribution", "--slices", "notes")[1]
    assert "Anna Abel" not in part and "CC-BY-4.0" in part
    code, _, said = gyro(*export, "--format", "attribution", "--slices", "note")
    assert code == 2 and "did you mean notes" in said
    assert gyro(*export, "--slices", "notes")[0] == 2

    rows = [line for line in gyro(*export)[1].splitlines() if line.startswith("| personal | ")]
    assert [line.split(" | ")[1] for line in rows] == ["prose", "code", "chat", "all"]
    assert all(line.split(" | ")[5] == "email" for line in rows), "no other kind was looked for"
    assert min(float(line.split(" | ")[3]) for line in rows) >= 0.98
