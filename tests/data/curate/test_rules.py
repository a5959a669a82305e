from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gyrocompass.data.curate.corpus import Corpus, CorpusWriter, annotation_path
from gyrocompass.data.curate.decide import LEDGER_SCHEMA, decide
from gyrocompass.data.curate.rules import Condition, Rule, threshold_of
from gyrocompass.data.curate.step import SPANS
from gyrocompass.data.document import Document

KNOWN = {
    "s.score": pa.float64(),
    "s.flag": pa.bool_(),
    "s.label": pa.string(),
    "s.spans": SPANS,
    "s.cluster": pa.string(),
    "s.partner": pa.string(),
    "s.names": pa.list_(pa.string()),
}
ROW = st.fixed_dictionaries(
    {
        "slice": st.sampled_from(["code", "prose/docs", "prose/mail", "chat"]),
        "score": st.none() | st.integers(0, 4).map(float),
        "flag": st.none() | st.booleans(),
        "label": st.none() | st.sampled_from("abc"),
        "cluster": st.none() | st.sampled_from("xyz"),
        "names": st.none() | st.lists(st.sampled_from("abc"), max_size=3),
        "kinds": st.lists(st.sampled_from(["email", "phone"]), max_size=3),
    }
)
THRESHOLD = st.integers(0, 4).map(float) | st.dictionaries(
    st.sampled_from(["code", "prose", "prose/docs", "*"]), st.integers(0, 4).map(float), min_size=1
)
CONDITION = st.one_of(
    st.tuples(st.sampled_from(["below", "above", "at_least", "at_most"]), THRESHOLD).map(
        lambda pair: {"column": "s.score", pair[0]: pair[1]}
    ),
    st.just({"column": "s.flag"}),
    st.just({"column": "s.label"}),
    st.sampled_from([True, False]).map(lambda null: {"column": "s.label", "is_null": null}),
    st.sampled_from(["is_in", "is_not_in"]).map(lambda name: {"column": "s.label", name: ["a", "c"]}),
    st.just({"column": "s.spans", "kinds": ["phone"]}),
    st.just({"column": "s.names"}),
    st.just({"column": "s.names", "is_in": ["a", "c"]}),
    st.integers(0, 3).map(lambda n: {"column": "s.names", "below": n}),
    st.integers(0, 3).map(lambda n: {"column": "s.spans", "above": n}),
    st.just({"column": "s.flag", "slices": ["prose", "chat"]}),
)
RULE = st.one_of(
    CONDITION.map(lambda condition: {"drop": condition}),
    CONDITION.map(lambda condition: {"keep": condition}),
    st.sampled_from(["highest", "lowest"]).map(
        lambda order: {"keep_one": {"column": "s.cluster", "prefer": [{"column": "s.score", "order": order}]}}
    ),
    st.just({"keep_one": {"column": "s.cluster", "prefer": [{"column": "s.label", "order": ["b", "a"]}]}}),
)


def corpus_of(folder: Path, rows: list[dict[str, Any]], shard_bytes: int) -> Corpus:
    writer = CorpusWriter(folder, shard_bytes=shard_bytes)
    documents = [
        Document(kind="text", text=f"text {n}", path=f"{n}.txt", source="s", slice=row["slice"])
        for n, row in enumerate(rows)
    ]
    for document in documents:
        writer.write(document)
    writer.close()
    corpus, place = Corpus(folder), 0
    for shard, n_rows in enumerate(corpus.rows):
        own = rows[place : place + n_rows]
        columns: dict[str, pa.Array] = {"id": pa.array([d.id for d in documents[place : place + n_rows]])}
        columns |= {
            name: pa.array([row[name] for row in own], KNOWN[f"s.{name}"])
            for name in ("score", "flag", "label", "cluster", "names")
        }
        columns["partner"] = pa.array(["p"] * n_rows)
        spans = [[{"start": 0, "end": 1, "kind": kind, "score": 1.0} for kind in row["kinds"]] for row in own]
        columns["spans"] = pa.array(spans, SPANS)
        pq.write_table(pa.table(columns), annotation_path(folder, shard))
        place += n_rows
    return Corpus(folder, {"s": folder}, batch_rows=3)


def holds(condition: dict[str, Any], row: dict[str, Any]) -> bool:
    """The condition by hand."""
    if "slices" in condition and not row["slice"].startswith(tuple(condition["slices"])):
        return False
    name = condition["column"].removeprefix("s.")
    value = row["kinds"] if name == "spans" else row[name]
    if "is_null" in condition:
        return (value is None) == condition["is_null"]
    if name == "spans":
        count = sum(kind in condition.get("kinds", ["email", "phone"]) for kind in value)
        return count > condition["above"] if "above" in condition else count > 0
    if value is None:
        return False
    if name == "names":
        left = [entry for entry in value if entry in condition.get("is_in", "abc")]
        return len(left) < condition["below"] if "below" in condition else len(left) > 0
    for sign, compared in {
        "below": float.__lt__,
        "above": float.__gt__,
        "at_least": float.__ge__,
        "at_most": float.__le__,
    }.items():
        if sign in condition:
            threshold = condition[sign]
            if isinstance(threshold, dict):
                fitting = [s for s in threshold if row["slice"] == s or row["slice"].startswith(f"{s}/")]
                best = max(fitting, key=len) if fitting else "*"
                threshold = threshold.get(best, math.nan)
            return bool(compared(value, threshold))
    if "is_in" in condition or "is_not_in" in condition:
        return value in condition["is_in"] if "is_in" in condition else value not in condition["is_not_in"]
    return bool(value)


def by_hand(rules: list[dict[str, Any]], rows: list[dict[str, Any]], ids: list[str]) -> list[int | str]:
    """For each row "kept", or the number of the rule that dropped it."""
    fate: list[int | str] = ["undecided"] * len(rows)
    # What depends on other documents comes after what does not.
    for number, rule in sorted(enumerate(rules), key=lambda pair: "keep_one" in pair[1]):
        if "keep_one" in rule:
            (preference,) = rule["keep_one"]["prefer"]

            def worth(n: int, preference: dict[str, Any] = preference) -> tuple[Any, ...]:
                value = rows[n][preference["column"].removeprefix("s.")]
                order = preference["order"]
                if isinstance(order, list):
                    key: Any = order.index(value) if value in order else math.inf
                else:
                    key = math.inf if value is None else -value if order == "highest" else value
                return fate[n] != "kept", key, ids[n]

            for cluster in {row["cluster"] for row in rows} - {None}:
                left = [
                    n
                    for n, row in enumerate(rows)
                    if row["cluster"] == cluster and fate[n] in ("undecided", "kept")
                ]
                for n in left:
                    if n != min(left, key=worth) and fate[n] == "undecided":
                        fate[n] = number
            continue
        action, condition = next(iter(rule.items()))
        for n, row in enumerate(rows):
            if fate[n] == "undecided" and holds(condition, row):
                fate[n] = "kept" if action == "keep" else number
    return ["kept" if entry == "undecided" else entry for entry in fate]


@settings(deadline=None, max_examples=30)
@given(
    rows=st.lists(ROW, min_size=1, max_size=20),
    rules=st.lists(RULE, max_size=4),
    shard_bytes=st.sampled_from([10, 60, 1000]),
)
def test_verdicts_are_those_by_hand(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[dict[str, Any]],
    rules: list[dict[str, Any]],
    shard_bytes: int,
) -> None:
    corpus = corpus_of(tmp_path_factory.mktemp("corpus"), rows, shard_bytes)
    ids = [i for batch in corpus.batches(["id"]) for i in batch["id"].to_pylist()]
    verdicts = decide(corpus, [Rule.model_validate(rule) for rule in rules], KNOWN)
    fate = by_hand(rules, rows, ids)
    assert verdicts.kept_D.tolist() == [entry == "kept" for entry in fate]
    ledger = verdicts.ledger.to_pylist()
    assert verdicts.ledger.schema == LEDGER_SCHEMA
    assert [(row["id"], row["rule"]) for row in ledger] == [
        (name, entry) for name, entry in zip(ids, fate, strict=True) if entry != "kept"
    ]
    kept = {name for name, entry in zip(ids, fate, strict=True) if entry == "kept"}
    for row in ledger:
        if "keep_one" in rules[row["rule"]]:
            later = {
                name
                for name, entry in zip(ids, fate, strict=True)
                if isinstance(entry, int) and entry > row["rule"]
            }
            assert row["partner"] in kept | later, "it lost against one that this rule left"
        else:
            assert row["partner"] == "p"


CLUSTERED = KNOWN | {"s.duplicate": pa.bool_()}


@settings(deadline=None, max_examples=20)
@given(
    rows=st.lists(ROW, min_size=1, max_size=16),
    shard_bytes=st.sampled_from([10, 1000]),
    late=st.booleans(),
)
def test_of_a_cluster_one_stays_whatever_rule_drops_the_preferred(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], shard_bytes: int, late: bool
) -> None:
    """Where no row of a cluster is spared by what it says itself, all go; else exactly the originals stay."""
    folder = tmp_path_factory.mktemp("corpus")
    corpus = corpus_of(folder, rows, shard_bytes)
    first: dict[str, int] = {}
    duplicate = [
        row["cluster"] is not None and first.setdefault(row["cluster"], n) != n for n, row in enumerate(rows)
    ]
    for shard, begin in enumerate(np.cumsum([0, *corpus.rows[:-1]]).tolist()):
        path = annotation_path(folder, shard)
        flags = pa.array(duplicate[begin : begin + corpus.rows[shard]])
        pq.write_table(pq.read_table(path).append_column("duplicate", flags), path)
    rules = [{"drop": {"column": "s.duplicate"}}, {"drop": {"column": "s.label", "is_in": ["a"]}}]
    chosen = rules if late else rules[::-1]
    verdicts = decide(corpus, [Rule.model_validate(rule) for rule in chosen], CLUSTERED)
    ids = [i for batch in corpus.batches(["id"]) for i in batch["id"].to_pylist()]
    kept = {n for n, stays in enumerate(verdicts.kept_D) if stays}
    for name in {row["cluster"] for row in rows}:
        members = [n for n, row in enumerate(rows) if row["cluster"] == name]
        spared = [n for n in members if rows[n]["label"] != "a"]
        if name is None:
            assert kept & set(members) == set(spared)
        elif not spared:
            assert not kept & set(members)
        else:
            best = spared[0] if not duplicate[spared[0]] else min(spared, key=lambda n: ids[n])
            assert kept & set(members) == {best}
            if duplicate[best]:
                gone = [row for row in verdicts.ledger.to_pylist() if row["id"] in {ids[n] for n in spared}]
                assert {row["partner"] for row in gone} <= {ids[best]}


def test_a_threshold_is_that_of_the_longest_slice_that_fits() -> None:
    threshold = {"prose": 1.0, "prose/docs": 2.0, "*": 3.0}
    assert [threshold_of(threshold, name) for name in ("prose/docs", "prose/mail", "proses", "code")] == [
        2.0,
        1.0,
        3.0,
        3.0,
    ]


def test_a_rule_says_itself_in_words() -> None:
    said = [
        Condition(column="q.words", below=3),
        Condition(column="q.words", at_least={"a": 1.0}, slices=("a",)),
        Condition(column="licence", is_not_in=("MIT", "0BSD")),
        Condition(column="licence", is_null=True),
        Condition(column="p.spans", kinds=("email",), above=2),
    ]
    assert [condition.sentence() for condition in said] == [
        "q.words < 3",
        "q.words >= its slice's in a",
        "licence is not in MIT, 0BSD",
        "licence is unknown",
        "p.spans[email] > 2",
    ]
