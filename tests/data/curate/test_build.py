from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from curate_steps import RULES, built, config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gyrocompass.core.errors import BadInput, ConfigError, GyroError
from gyrocompass.core.store import Store
from gyrocompass.data.curate.build import Built
from gyrocompass.data.curate.dataset import COVERED, LEDGER
from gyrocompass.data.curate.executor import LocalExecutor
from gyrocompass.data.curate.reading import NAMED_TWICE, Seen
from gyrocompass.data.curate.versions import open_dataset, read_facts
from gyrocompass.data.document import read_documents, read_quarantined


def lines(path: Path, texts: Sequence[str], **more: Any) -> Path:
    records = [{"id": f"r{number}", "text": text, **more} for number, text in enumerate(texts)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def root_of(found: Built) -> str:
    return str(read_facts(found.dataset.path)["root"])


def texts_of(found: Built) -> list[str]:
    return [document.text for document in read_documents(found.dataset.path)]


TEXTS = [f"{'abc'[n % 3]}{n // 9} " + " ".join(["w" * (k % 7 + 1) for k in range(n % 11)]) for n in range(60)]


def test_a_build_keeps_drops_and_covers_and_says_why(tmp_path: Path) -> None:
    source = lines(
        tmp_path / "a.jsonl",
        ["too short", "one two three four", "one two three four five", "alone with itself here"],
    )
    found = built(config(source), tmp_path / "store")
    assert texts_of(found) == ["one two [longest] four five", "alone with [longest] here"]
    ledger = pq.read_table(found.dataset.path / LEDGER).to_pylist()
    assert [(row["path"], row["title"], row["value"], row["threshold"]) for row in ledger] == [
        (f"{source}#r0", "count_words.words < its slice's", "2", 4.0),
        (f"{source}#r1", "another one of its same_start.cluster", min(r["value"] for r in ledger[1:]), None),
    ]
    kept = list(read_documents(found.dataset.path))
    assert ledger[1]["partner"] == kept[0].origin_ids[0]
    covered = pq.read_table(found.dataset.path / COVERED).to_pylist()
    assert [(row["id"], row["new_id"], row["kinds"]) for row in covered] == [
        (document.origin_ids[0], document.id, [("longest", 1)]) for document in kept
    ]
    counts = found.dataset.manifest.counts
    assert (counts["documents"], counts["dropped"], counts["covered"]) == (2, 2, 2)
    assert counts["bytes"] == sum(document.n_bytes for document in kept)


@settings(max_examples=5, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(
    texts=st.lists(st.text("abc ", min_size=1, max_size=30).filter(str.strip), min_size=1, max_size=15),
    batch_rows=st.integers(1, 12),
    shard_bytes=st.integers(60, 400),
)
def test_survivors_and_their_order_do_not_depend_on_batches_and_shards(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], batch_rows: int, shard_bytes: int
) -> None:
    folder = tmp_path_factory.mktemp("builds")
    source = lines(folder / "a.jsonl", texts)
    one = built(config(source), folder / "one")
    other = built(config(source, shard_bytes=shard_bytes), folder / "other", batch_rows=batch_rows)
    assert root_of(one) == root_of(other)
    assert texts_of(one) == texts_of(other)
    same_shards = built(config(source), folder / "same", batch_rows=batch_rows)
    assert same_shards.dataset.id == one.dataset.id


def test_two_workers_give_the_same_artifacts_as_one(tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl", TEXTS)
    one = built(config(source), tmp_path / "one")
    two = built(config(source), tmp_path / "two", LocalExecutor(2), batch_rows=3)
    assert [stage.artifact.id for stage in one.stages] == [stage.artifact.id for stage in two.stages]


def test_the_root_says_nothing_of_the_order_of_documents(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    roots = set()
    for order in (1, -1):
        records = [{"id": f"r{number}", "text": text} for number, text in enumerate(TEXTS)][::order]
        source.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        roots.add(root_of(built(config(source), tmp_path / f"store{order}")))
    assert len(roots) == 1


def test_other_thresholds_scan_nothing_again(tmp_path: Path) -> None:
    source, counts = lines(tmp_path / "a.jsonl", TEXTS), tmp_path / "counts"
    steps = [{"count_words": {"counting_file": str(counts)}}, "same_start"]
    first = built(config(source, steps=steps), tmp_path / "store")
    looked_at = counts.stat().st_size
    assert looked_at == len(TEXTS)
    strict = [{"drop": {"column": "count_words.words", "below": 8}}]
    second = built(config(source, steps=steps, rules=strict), tmp_path / "store")
    assert counts.stat().st_size == looked_at
    assert [stage.reused for stage in second.stages] == [True, True, True, False]
    assert second.dataset.manifest.counts["dropped"] == sum(len(text.split()) < 8 for text in TEXTS)
    assert first.dataset.id != second.dataset.id
    again = built(config(source, steps=steps), tmp_path / "store")
    assert all(stage.reused for stage in again.stages) and again.dataset.id == first.dataset.id


def test_a_document_more_scans_a_shard_or_two(tmp_path: Path) -> None:
    source, counts = lines(tmp_path / "a.jsonl", TEXTS * 3), tmp_path / "counts"
    steps = [{"count_words": {"counting_file": str(counts)}}, "same_start"]
    built(config(source, steps=steps), tmp_path / "store")
    before = counts.stat().st_size
    source.write_text(source.read_text() + json.dumps({"id": "new", "text": "a new one at the end"}) + "\n")
    more = built(config(source, steps=steps), tmp_path / "store")
    assert 0 < counts.stat().st_size - before < before / 3
    assert root_of(more) == root_of(built(config(source, steps=steps), tmp_path / "fresh"))


def test_a_document_that_a_step_fails_on_is_named_and_may_be_dropped(tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl", ["one two three four", "poison in the well", "a b c d e"])
    with pytest.raises(GyroError, match=r"count_words failed on 1 of 3(.|\n)*a\.jsonl#r1: ZeroDivisionError"):
        built(config(source), tmp_path / "store")
    found = built(config(source, max_failed_share=0.5), tmp_path / "store")
    (row,) = pq.read_table(found.dataset.path / LEDGER).to_pylist()
    assert (row["title"], row["value"]) == ("count_words failed", "ZeroDivisionError: poisoned")
    assert len(texts_of(found)) == 2


def test_records_with_one_name_and_different_texts_are_quarantined(tmp_path: Path) -> None:
    records = [{"id": "x", "text": "one"}, {"id": "x", "text": "another"}, {"id": "x", "text": "one"}]
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    found = built(config(source, steps=[], rules=[]), tmp_path / "store")
    assert texts_of(found) == ["one"]
    (entry,) = read_quarantined(found.dataset.path)
    assert (entry.path, entry.reason) == (f"{source}#x", NAMED_TWICE)
    assert found.corpus.manifest.counts["skipped"] == 1


def test_two_sources_that_list_one_file_read_it_once(tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl", TEXTS)
    twice = [{"jsonl": {"path": str(source), "name": name}} for name in ("first", "second")]
    found = built(config(source, sources=twice, steps=[], rules=[]), tmp_path / "store")
    assert found.corpus.manifest.counts["documents"] == len(TEXTS)
    assert {document.source for document in read_documents(found.dataset.path)} == {"first"}


def test_what_is_opted_out_is_not_read(tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl", TEXTS)
    before = built(config(source, steps=[], rules=[]), tmp_path / "store")
    documents = list(read_documents(before.dataset.path))
    listed = tmp_path / "list.txt"
    listed.write_text(f"{documents[3].id}  # a remark\n\n# all\n{documents[4].content_hash}\npath:*#r1?\n")
    after = built(config(source, steps=[], rules=[], opt_out=[str(listed)]), tmp_path / "store")
    left = [d for d in documents if d not in documents[3:5] and not d.path.partition("#")[2].startswith("r1")]
    kept = list(read_documents(after.dataset.path))
    assert documents[1] in kept  # r1 itself is not r1?
    assert kept == [d for d in documents if d in left or d == documents[1]]


def test_an_entry_that_is_none_is_refused_with_its_line(tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl", TEXTS)
    listed = tmp_path / "list.txt"
    listed.write_text("# fine\nsomebody\n")
    with pytest.raises(BadInput, match="not an entry") as raised:
        built(config(source, opt_out=[str(listed)]), tmp_path / "store")
    assert raised.value.where == f"{listed}:2"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"steps": ["count_wrods"]}, r"steps\.0: there is no step 'count_wrods'; did you mean count_words\?"),
        (
            {"steps": [{"count_words": {"wait": 1}}, "same_start"]},
            r"steps\.0\.count_words\.wait: unknown key; did you mean wait_s\?",
        ),
        ({"steps": ["count_words", "count_words"]}, r"steps\.1: the label count_words stands twice"),
        (
            {"rules": [{"drop": {"column": "count_words.word", "below": 1}}]},
            r"rules\.0\.drop: there is no column count_words\.word; did you mean count_words\.words\?",
        ),
        ({"rules": [{"drop": {"column": "slice", "below": 1}}]}, "slice is no number"),
        ({"rules": [{"mask": {"column": "count_words.words"}}]}, "holds no spans"),
        (
            {"rules": [{"drop": {"column": "n_bytes", "below": 1, "above": 2}}]},
            "one comparison, not below and",
        ),
        ({"rules": [{"drop": {"column": "count_words.words", "is_in": ["1"]}}]}, "holds no names"),
        ({"rules": [{}]}, "a rule has one key of keep, drop"),
    ],
)
def test_a_wrong_build_is_refused_before_anything_is_read(
    tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        config(tmp_path / "missing.jsonl", **changed)


def test_a_step_may_be_listed_twice_under_labels(tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl", TEXTS)
    steps = ["count_words", {"count_words": {"as": "again"}}, "same_start"]
    rules = [{"drop": {"column": "again.words", "below": 5}}]
    found = built(config(source, steps=steps, rules=rules), tmp_path / "store")
    assert found.stages[1].artifact.id == found.stages[0].artifact.id or found.stages[2].reused
    assert found.dataset.manifest.counts["dropped"] == sum(len(text.split()) < 5 for text in TEXTS)
    # What the manifest keeps is the same build again.
    assert found.dataset.manifest.recipe["steps"][1] == {
        "count_words": {"as": "again", "wait_s": 0.0, "counting_file": None}
    }


def test_a_data_set_is_found_by_name_id_and_folder(tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl", TEXTS)
    found = built(config(source), tmp_path / "store")
    store = Store(tmp_path / "store")
    for name in (None, "tests", found.dataset.id, found.dataset.id[:12], str(found.dataset.path)):
        assert open_dataset(store, name).id == found.dataset.id
    with pytest.raises(BadInput, match="did you mean tests"):
        open_dataset(store, "test")
    with pytest.raises(BadInput, match="of the kind corpus"):
        open_dataset(store, found.corpus.id)


def test_rules_are_kept_as_they_were_written(tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl", TEXTS)
    found = built(config(source), tmp_path / "store")
    assert len(found.dataset.manifest.recipe["rules"]) == len(RULES)


def test_seen_remembers_every_text() -> None:
    seen = Seen()
    for number in range(200_000):
        if number % 3:
            seen.add(f"text {number}")
    assert [f"text {number}" in seen for number in range(0, 200_000, 97)] == [
        bool(number % 3) for number in range(0, 200_000, 97)
    ]
