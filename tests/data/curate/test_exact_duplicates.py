from __future__ import annotations

import re
import unicodedata
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gyrocompass.data.curate.exact_duplicates import ExactDuplicateStep, exact_duplicates, normalised_hash
from gyrocompass.data.curate.step import MemoryCorpus, columns_of
from gyrocompass.data.curate.survivors import SurvivorRule, survival_order
from gyrocompass.data.document import Document

TEXTS = st.lists(st.text("aAß \n\u00a0.é\u0301ﬁfi", max_size=4), max_size=20)


def normalised(text: str) -> str:
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return re.sub(r"\s+", "", folded)


@given(TEXTS, st.randoms(use_true_random=False))
def test_clusters_are_those_of_equal_texts(texts: list[str], draw: Any) -> None:
    ids = [f"{number:03d}" for number in range(len(texts))]
    rows = {row["id"]: row for row in exact_duplicates(texts, ids).to_pylist()}
    for name, text in zip(ids, texts, strict=True):
        alike = [
            other for other, known in zip(ids, texts, strict=True) if normalised(known) == normalised(text)
        ]
        same = [other for other, known in zip(ids, texts, strict=True) if known == text]
        expected = same[0] if same[0] != name else alike[0]
        assert rows[name]["cluster"] == (alike[0] if len(alike) > 1 else None)
        assert rows[name]["duplicate"] == (alike[0] != name)
        assert rows[name]["partner"] == (expected if alike[0] != name else None)
        assert rows[name]["exact"] == ((same[0] != name) if alike[0] != name else None)
    order = draw.sample(range(len(texts)), len(texts))
    shuffled = exact_duplicates([texts[n] for n in order], [ids[n] for n in order])
    assert {row["id"]: row for row in shuffled.to_pylist()} == rows


def test_case_alone_counts_where_nothing_is_normalised() -> None:
    step = ExactDuplicateStep(normalised=False)
    assert exact_duplicates(["a", "A", "a"], step=step)["duplicate"].to_pylist() == [False, False, True]


def test_punctuation_is_content() -> None:
    assert normalised_hash("a - b") != normalised_hash("a + b")
    assert normalised_hash("a+b") == normalised_hash("A + B\n")


def test_records_with_one_text_and_other_labels_are_the_same_but_not_exactly() -> None:
    one = Document(kind="text", text="x", source="s", slice="a", path="")
    documents = [replace(one, path=str(n), labels={"score": float(n % 2)}) for n in range(3)]
    columns = [("id", pa.string()), ("content_hash", pa.string()), ("text", pa.large_string())]
    rows = [{name: getattr(document, name) for name, _ in columns} for document in documents]
    batch = pa.RecordBatch.from_pylist(rows, pa.schema(columns))
    step = ExactDuplicateStep()
    found = step.resolve(iter([step.signatures(batch)]), MemoryCorpus([batch]))
    assert found["duplicate"].to_pylist() == [False, True, True]
    assert sum(exact is True for exact in found["exact"].to_pylist()) == 1


def test_the_step_has_its_columns_before_there_are_documents() -> None:
    assert list(columns_of(ExactDuplicateStep(), {})) == [
        "cluster",
        "duplicate",
        "partner",
        "exact",
        "similarity",
    ]


@pytest.mark.parametrize(
    ("licence", "rank"),
    [
        ("CC0-1.0", 0), ("MIT", 1), ("(MIT OR GPL-2.0-only)", 1), ("MIT AND GPL-2.0-only", 4),
        ("CC-BY-4.0", 2), ("CC-BY-SA-4.0", 4), ("LGPL-2.1-or-later", 3), ("LicenseRef-mine", 5),
        ("", 6), (None, 6),
    ],
)  # fmt: skip
def test_licences_have_an_order(licence: str | None, rank: int) -> None:
    assert SurvivorRule().licence_rank(licence) == rank


def test_unknown_quality_and_time_come_last() -> None:
    rule = SurvivorRule(quality="q.score")
    batch = pa.RecordBatch.from_pylist(
        [{"id": "a", "q.score": None}, {"id": "b", "q.score": -5.0}, {"id": "c", "q.score": 0.5}],
        pa.schema([("id", pa.string()), ("q.score", pa.float64())]),
    )
    standings = pa.RecordBatch.from_arrays(rule.standings(batch), ["licence_rank", "quality", "time"])
    assert survival_order(batch["id"], standings).tolist() == [2, 1, 0]
