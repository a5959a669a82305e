from __future__ import annotations

import errno
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gyrocompass.core.errors import BadInput, GyroError
from gyrocompass.data.curate import near_duplicates as module
from gyrocompass.data.curate.near_duplicates import NearDuplicateStep, near_duplicates
from gyrocompass.data.curate.planted_duplicates import Planted, measured, plant
from gyrocompass.data.curate.spill import Spill
from gyrocompass.data.curate.step import MemoryCorpus, columns_of, step_types
from gyrocompass.data.curate.survivors import SurvivorRule

STDLIB = sorted(Path(json.__file__).parents[1].glob("*.py"))


@pytest.fixture(scope="module")
def planted() -> Planted:
    texts = []
    for path in STDLIB[:80]:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        texts += ["\n".join(lines[start : start + 60]) for start in (0, 60, 120) if len(lines) > start + 50]
    return plant(texts, share=0.9)


def rows_by_id(table: pa.RecordBatch) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in table.to_pylist()}


def annotated(step: NearDuplicateStep, documents: list[dict[str, Any]], batch_rows: int = 7) -> Any:
    schema = pa.schema([("id", pa.string()), ("text", pa.large_string()), ("licence", pa.string())])
    if documents and "time" in documents[0]:
        schema = schema.append(pa.field("time", pa.timestamp("us", tz="UTC")))
    if documents and "quality.score" in documents[0]:
        schema = schema.append(pa.field("quality.score", pa.float32()))
    parts = [documents[start : start + batch_rows] for start in range(0, len(documents), batch_rows)] or [[]]
    batches = [pa.RecordBatch.from_pylist(part, schema) for part in parts]
    return rows_by_id(step.resolve(map(step.signatures, batches), MemoryCorpus(batches)))


def test_planted_pairs_are_found_and_nothing_else(planted: Planted) -> None:
    found = near_duplicates(planted.texts)
    pairs = {(int(one), int(other)) for one, other in found.every_pair()}
    quality = measured(pairs, planted.pairs(0.7))
    assert quality.n_true > 100 and quality.precision == 1 and quality.recall >= 0.99
    for one, other, jaccard in found.pairs():
        pair = (min(int(one), int(other)), max(int(one), int(other)))
        assert jaccard == pytest.approx(planted.jaccard[pair])


def test_each_dropped_document_names_a_partner_it_is_near_to(planted: Planted) -> None:
    step = NearDuplicateStep()
    rows = annotated(step, [{"id": f"{n:08d}", "text": text} for n, text in enumerate(planted.texts)], 50)
    dropped = [row for row in rows.values() if row["duplicate"]]
    assert dropped
    for row in dropped:
        for other, similarity in (("partner", "similarity"), ("survivor", "survivor_similarity")):
            pair = sorted((int(row["id"]), int(row[other])))
            assert row[similarity] == pytest.approx(planted.jaccard.get((pair[0], pair[1]), 0.0), abs=1e-6)
            assert rows[row[other]]["cluster"] == row["cluster"]
        assert row["similarity"] >= step.threshold and not rows[row["survivor"]]["duplicate"]
    alone = [row for row in rows.values() if row["cluster"] is None]
    assert alone and not any(row["duplicate"] or row["partner"] for row in alone)
    for name in {row["cluster"] for row in rows.values()} - {None}:
        members = [row for row in rows.values() if row["cluster"] == name]
        assert name == min(row["id"] for row in members)
        assert sum(not row["duplicate"] for row in members) == 1


VERSES = [
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
]


TIMES = [None, datetime(2020, 1, 1, tzinfo=UTC), datetime(2021, 1, 1, tzinfo=UTC)]


@st.composite
def corpora(draw: st.DrawFn) -> list[dict[str, Any]]:
    documents = []
    for number in range(draw(st.integers(0, 14))):
        words = list(VERSES)
        for place in draw(st.lists(st.integers(0, 14), max_size=2)):
            words[place] = draw(st.sampled_from(["other", "more", "é"]))
        documents.append(
            {
                "id": f"{(number * 7919) % 1000:016x}",
                "text": " ".join(words if draw(st.integers(0, 5)) else []),
                "licence": draw(st.sampled_from(["MIT", "GPL-3.0-only", None])),
                "time": draw(st.sampled_from(TIMES)),
                "quality.score": draw(st.sampled_from([None, 0.1, 0.9])),
            }
        )
    return documents


@settings(max_examples=60, deadline=None)
@given(corpora(), st.randoms(use_true_random=False), st.integers(1, 20), st.integers(2, 5))
def test_neither_order_nor_batches_nor_memory_change_anything(
    documents: list[dict[str, Any]], draw: Any, batch_rows: int, largest_bucket: int
) -> None:
    rule = SurvivorRule(quality="quality.score")
    step = NearDuplicateStep(shingle_words=2, threshold=0.5, survivors=rule, largest_bucket=largest_bucket)
    expected = annotated(step, documents)
    shuffled = draw.sample(documents, len(documents))
    assert annotated(step, shuffled, batch_rows) == expected
    assert annotated(step.model_copy(update={"memory_mb": 0}), shuffled, batch_rows) == expected


def test_survivors_are_best_by_licence_then_quality_then_age_then_id() -> None:
    def documents(**columns: list[Any]) -> list[dict[str, Any]]:
        known = {"licence": [None] * 3, "time": [None] * 3, "quality.score": [None] * 3} | columns
        return [
            {"id": name, "text": " ".join(VERSES)} | {key: values[n] for key, values in known.items()}
            for n, name in enumerate("abc")
        ]

    def survivor(given: list[dict[str, Any]]) -> str:
        step = NearDuplicateStep(survivors=SurvivorRule(quality="quality.score"))
        (name,) = (row["id"] for row in annotated(step, given).values() if not row["duplicate"])
        return str(name)

    times = [datetime(2022, 1, 1, tzinfo=UTC), datetime(2021, 1, 1, tzinfo=UTC), None]
    licences = ["GPL-2.0-only", "MIT", "CC0-1.0"]
    assert survivor(documents()) == "a"
    assert survivor(documents(time=times)) == "b"
    assert survivor(documents(time=times, **{"quality.score": [0.5, 0.5, 0.6]})) == "c"
    assert survivor(documents(licence=[*licences[:2], None], **{"quality.score": [0.1, 0.0, 0.6]})) == "b"
    assert survivor(documents(licence=licences, time=times)) == "c"


def test_a_bucket_of_any_size_becomes_one_cluster_without_all_its_pairs() -> None:
    texts = [" ".join([*VERSES * 10, f"end{number}"]) for number in range(400)]
    found = near_duplicates(texts, step=NearDuplicateStep(largest_bucket=8, shingle_words=2))
    assert np.unique(found.survivor_D).tolist() == [0]
    assert found.n_compared < 4000


def test_bands_are_sorted_in_parts_with_the_same_result(
    planted: Planted, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gyrocompass.data.curate import near_index

    whole = set(near_duplicates(planted.texts).pairs())
    monkeypatch.setattr(near_index, "_LEAST_PART_BYTES", 1000)
    monkeypatch.setattr(near_index, "_ROWS_AT_ONCE", 97)
    assert set(near_duplicates(planted.texts, step=NearDuplicateStep(memory_mb=0)).pairs()) == whole


def test_a_chain_says_how_far_its_ends_are() -> None:
    words = [f"w{number}" for number in range(100)]
    texts = [" ".join([*words[shift:], *(f"x{number}" for number in range(shift))]) for shift in (0, 10, 20)]
    step = NearDuplicateStep(shingle_words=1, threshold=0.8)
    found = near_duplicates(texts, step=step)
    assert found.clusters() == {"00000000": ["00000001", "00000002"]}
    assert found.partner_D.tolist() == [-1, 0, 1]
    assert found.partner_jaccard_D[2] == pytest.approx(90 / 110)
    assert found.survivor_jaccard_D[2] == pytest.approx(80 / 120)


def test_documents_without_words_are_nobodys_duplicates() -> None:
    found = near_duplicates(["", "...", "", "one", "ONE!"])
    assert list(found.pairs()) == [("00000003", "00000004", 1.0)]


def test_ids_are_one_for_each_text() -> None:
    with pytest.raises(BadInput, match="two texts have the id a"):
        near_duplicates(["one", "two"], ["a", "a"])
    with pytest.raises(BadInput, match="1 texts, but 2 ids"):
        near_duplicates(["one"], ["a", "b"])
    with pytest.raises(BadInput, match="more than 1 texts"):
        near_duplicates(["one", "two"], ["a"])


def test_a_full_disk_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def write(self, _: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Spill, "open", lambda _: Full())
    with pytest.raises(GyroError, match="No space left on device") as raised:
        near_duplicates(["one two"], step=NearDuplicateStep(memory_mb=0))
    assert raised.value.fix is not None and "TMPDIR" in raised.value.fix


def test_a_folder_that_is_not_there_is_an_error_that_names_it(tmp_path: Path) -> None:
    with Spill(0, str(tmp_path / "none")) as spill, pytest.raises(GyroError) as raised:
        spill.array(np.uint64).append(np.ones(1, np.uint64))
    assert raised.value.where == str(tmp_path / "none")


def test_the_step_has_its_columns_before_there_are_documents() -> None:
    assert step_types()["near_duplicates"] is NearDuplicateStep
    columns = columns_of(NearDuplicateStep(), {})
    assert list(columns) == [
        "cluster",
        "duplicate",
        "partner",
        "similarity",
        "survivor",
        "survivor_similarity",
    ]
    assert module.NearDuplicateStep().reads() == ()
