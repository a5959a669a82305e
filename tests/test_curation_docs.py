"""docs/curation.md says what is true: its build runs, its commands answer, its step is one."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from gyrocompass.data.curate.config import BuildConfig
from gyrocompass.data.curate.rules import Rule
from gyrocompass.data.curate.step import RecordStep, columns_of
from gyrocompass.data.sources import Source

DOCS = (Path(__file__).parents[1] / "docs" / "curation.md").read_text(encoding="utf-8")
FOUND = re.findall(r"```(\w+)\n(.*?)```", DOCS, re.DOTALL)
BLOCKS = dict(reversed(FOUND))
"""The first of each language."""

Run = Callable[..., tuple[int, str, str]]


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gyro: Run) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GYRO_STORE", str(tmp_path / "store"))
    (tmp_path / "notes").mkdir()
    letter = "Dear reader, write to anna.weber@posteo.de about the compass and the northern lights. "
    notes = {
        "short.md": "Too short.",
        "letter.md": letter + "Yours, the keeper of the lighthouse.",
        "copy.md": letter + "Yours, the keeper of the lighthouse.",
        "other.md": "A ship's log of the third week: fair winds, and no land in sight so far.",
    }
    for name, text in notes.items():
        (tmp_path / "notes" / name).write_text(text)
    (tmp_path / "build.yaml").write_text(BLOCKS["yaml"])
    said = {}
    for line in BLOCKS["bash"].splitlines():
        command = shlex.split(line.partition("#")[0])
        code, out, err = gyro(*command[1:])
        assert code == 0, (line, err)
        said[command[2] if command[1] == "data" else command[1]] = out
    assert "kept" in said["build"] and "too short" in said["build"]
    assert "dropped by the rule: too short" in said["why"] and "the threshold 40" in said["why"]
    assert "the same documents" in said["diff"]
    assert "reports/dataset-" in said["inspect"] and "anna.weber" not in said["inspect"]
    assert said["export"].startswith("# notes\n")
    assert "holds it" in said["forget"]


def test_the_sources_of_raw_files_are_sources() -> None:
    (raw,) = [text for kind, text in FOUND if kind == "yaml" and "ingest:" in text]
    sources = [Source.model_validate(source) for source in yaml.safe_load(raw)["sources"]]
    assert sources[0].ingest is not None and sources[1].debian is not None


def test_every_rule_stands_in_the_table() -> None:
    listed = re.findall(r"^\| `(\w+): \{", DOCS, re.MULTILINE)
    assert listed == [name for name in Rule.model_fields if name != "name"]


def test_every_setting_of_a_build_that_is_named_is_one() -> None:
    for name in ("max_quarantined_share", "max_failed_share", "opt_out"):
        assert name in BuildConfig.model_fields and f"`{name}" in DOCS


def test_the_step_is_one() -> None:
    names: dict[str, object] = {}
    exec(BLOCKS["python"].replace("@register\n", ""), names)
    step = names["Questions"]
    assert isinstance(step, type) and issubclass(step, RecordStep)
    assert list(columns_of(step(), {})) == ["count"]
