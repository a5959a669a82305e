"""docs/data.md is true: each line is read as the kind it stands under; no field that is read is missing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest

from gyrocompass.data.document import Document
from gyrocompass.data.records import LABELS, ContentField, Place, RecordOptions, read_record
from gyrocompass.loss.objective import OBJECTIVES
from gyrocompass.measure.rewards.entries import REWARDS

PAGE = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
EXAMPLES = [
    (kind, line)
    for kind, block in re.findall(r"```jsonl (\w+)\n(.*?)```", PAGE, re.DOTALL)
    for line in block.splitlines()
]
RECORDS: list[dict[str, Any]] = [json.loads(line) for _, line in EXAMPLES]


@pytest.mark.parametrize(("kind", "line"), EXAMPLES)
def test_every_example_is_read_as_its_kind(kind: str, line: str) -> None:
    document = read_record(json.loads(line), RecordOptions(), Place("data.jsonl", 1, "data"))
    assert isinstance(document, Document), document
    assert document.kind == kind


def test_every_kind_and_every_field_of_content_has_an_example() -> None:
    assert {kind for kind, _ in EXAMPLES} == {"text", "completion", "chat", "preference"}
    fields = {name for record in RECORDS for name in record}
    wanted = {*get_args(ContentField), *LABELS, "labels", "unit", "tests"}
    assert wanted | {"slice", "source", "licence", "language", "weight", "id", "group"} <= fields


def test_what_an_example_says_is_kept() -> None:
    said = {}
    for record in RECORDS:
        document = read_record(record, RecordOptions(), Place("data.jsonl", 1, "data"))
        assert isinstance(document, Document)
        said |= {name: record[name] for name in ("label", "score", "margin", "labels") if name in record}
        assert document.unit == record.get("unit")
        assert list(document.tests) == record.get("tests", [])
        assert len(document.steps) == len(record.get("steps", []))
        assert document.gold == record.get("gold", "")
        for name, label in LABELS.items():
            assert document.labels.get(label) == record.get(name)
    assert len(said) == 4


def test_every_objective_and_reward_that_is_named_exists() -> None:
    rows = [line.split("|") for line in PAGE.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row[3])}
    assert len(rows) == 7 and named - {"desirable"} <= {*OBJECTIVES, *REWARDS}
