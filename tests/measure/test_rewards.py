"""Rewards on text, their sums and their entries in YAML."""

from __future__ import annotations

import math
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gyrocompass.core.errors import BadInput, ConfigError, GyroError, MissingDependency
from gyrocompass.measure.reward import Part, Sample, WeightedSum, checked
from gyrocompass.measure.rewards.entries import parse_rewards
from gyrocompass.measure.rewards.registry import REWARDS, Tools
from gyrocompass.measure.rewards.text import distinct_share


class Fixed:
    """A reward that says what it was given."""

    def __init__(self, name: str, values: list[float], low: float = 0.0, high: float = 1.0) -> None:
        self.name, self.values, self.low, self.high = name, values, low, high

    def __call__(self, samples) -> list[float]:
        return self.values


def one(entry: object, *samples: Sample) -> list[float]:
    return parse_rewards([entry])(samples)


@pytest.mark.parametrize("value", [math.nan, 1.5, -0.1, math.inf])
def test_a_value_outside_the_range_is_refused(value: float) -> None:
    samples = [Sample("p0", "c0"), Sample("p1", "c1")]
    with pytest.raises(GyroError, match=rf"the reward tests is {value} for sample 1") as raised:
        checked(Fixed("tests", [1.0, value]), samples)
    assert "'p1'" in str(raised.value)


def test_a_reward_that_loses_a_sample_is_refused() -> None:
    with pytest.raises(GyroError, match="gave 1 values for 2 samples"):
        checked(Fixed("tests", [1.0]), [Sample("", "")] * 2)


@given(
    st.lists(
        st.tuples(st.floats(-2, 2), st.lists(st.floats(-3, 5), min_size=3, max_size=3)),
        min_size=1,
        max_size=4,
    )
)
@settings(max_examples=30, deadline=None)
def test_a_sum_is_the_sum_and_stays_in_its_range(drawn: list[tuple[float, list[float]]]) -> None:
    parts = tuple(Part(Fixed(f"r{k}", values, -3, 5), weight) for k, (weight, values) in enumerate(drawn))
    total = WeightedSum(parts)
    scored = total.scored([Sample("", "")] * 3)
    for index in range(3):
        assert scored.total[index] == pytest.approx(sum(weight * values[index] for weight, values in drawn))
        assert total.low - 1e-9 <= scored.total[index] <= total.high + 1e-9
    assert scored.parts == {f"r{k}": values for k, (_, values) in enumerate(drawn)}


def test_exact_match() -> None:
    samples = [Sample("", c, {"answer": a}) for c, a in (("4", 4), (" a  b\n", "a b"), ("A", "a"), ("5", 4))]
    assert one("exact_match", *samples) == [1.0, 1.0, 0.0, 0.0]
    assert one({"exact_match": {"ignore_case": True}}, samples[2]) == [1.0]
    listed = Sample("", "two", {"gold": ["2", "two"]})
    assert one({"exact_match": {"field": "gold"}}, listed) == [1.0]
    extract = {"exact_match": {"extract": "#### (.*)"}}
    answers = ("#### 3 no\n#### 4", "4", "#### 3")
    assert one(extract, *(Sample("", text, {"answer": "4"}) for text in answers)) == [1.0, 0.0, 0.0]


def test_regex() -> None:
    found = {"regex": {"pattern": r"\d+"}}
    assert one(found, Sample("", "a 12"), Sample("", "none")) == [1.0, 0.0]
    found["regex"]["how"] = "whole"
    assert one(found, Sample("", "a 12"), Sample("", "12")) == [0.0, 1.0]
    assert one("regex", Sample("", "ab", {"pattern": "^a"})) == [1.0]
    with pytest.raises(BadInput, match=r"'\(' is not a regular expression"):
        one("regex", Sample("", "ab", {"pattern": "("}))
    with pytest.raises(ConfigError, match="not a regular expression"):
        parse_rewards([{"regex": {"pattern": "("}}])


SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


words = st.lists(st.sampled_from(["a", "b", "(", "return"]), max_size=8).map(" ".join)


@given(words, words, st.integers(1, 3))
def test_overlap_is_the_f1_of_shared_ngrams(answer: str, said: str, n: int) -> None:
    grams = [
        [tuple(text.split()[i : i + n]) for i in range(len(text.split()) - n + 1)] for text in (answer, said)
    ]
    shared, left = 0, list(grams[1])
    for gram in grams[0]:
        if gram in left:
            left.remove(gram)
            shared += 1
    (value,) = one({"overlap": {"n": n}}, Sample("", said, {"answer": answer}))
    if any(grams):
        precision, recall = (shared / len(own) if own else 0.0 for own in (grams[1], grams[0]))
        wanted = 2 * precision * recall / (precision + recall) if shared else 0.0
        assert value == pytest.approx(wanted)
    else:
        assert value == float(answer == said)


def test_overlap_reads_code_sign_by_sign() -> None:
    assert one("overlap", Sample("", "f( x )", {"answer": "f(x)"})) == [1.0]
    with pytest.raises(BadInput, match="the reward overlap needs the field 'answer'"):
        one("overlap", Sample("", "x"))


def test_what_a_reward_needs_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = {
        name: REWARDS[name].needs for name in ("linted", "secure", "unit_tests", "parses", "json_schema")
    }
    assert needed == {
        "linted": "ruff",
        "secure": "bandit",
        "unit_tests": "sandbox",
        "parses": None,
        "json_schema": "jsonschema",
    }
    assert REWARDS["parses"].why_not() is None
    monkeypatch.setattr("gyrocompass.measure.rewards.registry.find_spec", lambda name: None)
    assert REWARDS["secure"].why_not() == "bandit is not installed: pip install 'gyrocompass[rewards]'"


def test_json_schema() -> None:
    pytest.importorskip("jsonschema")
    texts = ('{"n": 1}', '{"n": "1"}', "{}", '{"n": 1', '{"n": NaN}', "[" * 100_000, '{"n": 1} ')
    wanted = [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    assert one({"json_schema": {"inline": SCHEMA}}, *(Sample("", text) for text in texts)) == wanted
    assert one("json_schema", Sample("", "3", {"schema": '{"type": "string"}'})) == [0.0]
    for schema in ({"type": "no such type"}, "{"):
        with pytest.raises(BadInput, match="not a JSON schema"):
            one("json_schema", Sample("", "3", {"schema": schema}))
    elsewhere = {"$ref": "http://127.0.0.1:9/schema.json"}
    with pytest.raises(BadInput, match=r"refers to 'http://127\.0\.0\.1:9/schema\.json'"):
        one("json_schema", Sample("", "3", {"schema": elsewhere}))


def test_json_schema_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    with pytest.raises(MissingDependency, match="json_schema needs the package jsonschema") as raised:
        one({"json_schema": {"inline": {"title": "never seen before"}}}, Sample("", "3"))
    assert "gyrocompass[rewards]" in str(raised.value)


def test_a_missing_field_is_named_with_those_there_are() -> None:
    with pytest.raises(BadInput, match=r"exact_match needs the field 'answer'.*has: solution"):
        one("exact_match", Sample("the prompt", "c", {"solution": "x"}))


@given(st.lists(st.sampled_from("abc"), max_size=12), st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_the_distinct_share_counts_n_grams(words: list[str], n: int) -> None:
    grams = [" ".join(words[i : i + n]) for i in range(len(words)) if i + n <= len(words)]
    wanted = len(set(grams)) / len(grams) if grams else 1.0
    assert distinct_share(" ".join(words), n) == wanted
    assert one({"distinct": {"n": n}}, Sample("", " ".join(words))) == [wanted]


def test_entries_are_checked_and_named() -> None:
    total = parse_rewards(["parses", {"length": {"target": 5, "weight": -0.5, "name": "brevity"}}], Tools())
    assert [part.reward.name for part in total.parts] == ["parses", "brevity"]
    assert (total.low, total.high) == (-0.5, 1.0)
    scored = total.scored([Sample("", "x = 1", n_tokens=5)])
    assert scored.total == [0.5] and scored.parts == {"parses": [1.0], "brevity": [1.0]}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["parse"], "unknown reward 'parse'; did you mean parses"),
        ([{"length": {"target": 0}}], "target"),
        ([{"length": {}}], "the key target is missing"),
        ([{"length": {"target": 3, "slak": 1}}], "did you mean slack"),
        (["parses", "parses"], "two rewards are called parses"),
        ([], "at least one entry"),
        ("parses", "at least one entry"),
        ([{"parses": {}, "compiles": {}}], "an entry is one reward's name"),
        ([{"parses": {"weight": float("nan")}}], "weight"),
    ],
)
def test_mistakes_in_entries(entries: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_rewards(entries)


def test_every_reward_says_one_number_for_each_sample_and_none_for_none() -> None:
    parse_rewards(["parses"])
    assert {"exact_match", "regex", "json_schema", "length", "distinct", "judge", "reward_model"} <= set(
        REWARDS
    )
    assert {"parses", "compiles", "unit_tests", "linted", "formatted", "secure"} <= set(REWARDS)
    for name in (
        "exact_match",
        "regex",
        "distinct",
        "parses",
        "compiles",
        "unit_tests",
        "linted",
        "formatted",
    ):
        assert one(name) == []
