"""`gyro diff`: what differs between recipes, data sets, models and other artifacts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gyrocompass.core.store import Store
from gyrocompass.govern.difference import ABSENT, difference, settings_between
from gyrocompass.recipe.run import read_run
from tiny_recipe import FinishedRun

Gyro = Callable[..., tuple[int, str, str]]
LEAF = st.one_of(st.integers(0, 3), st.text(max_size=2), st.none(), st.booleans())
TREE = st.recursive(
    LEAF,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(TREE, TREE)
def test_settings_differ_exactly_where_values_do(one: Any, other: Any) -> None:
    assert not list(settings_between(one, one))
    found = list(settings_between(one, other))
    assert bool(found) == (one != other)
    back = list(settings_between(other, one))
    assert [(s.path, s.after, s.before) for s in found] == [(s.path, s.before, s.after) for s in back]


def test_settings_name_the_path() -> None:
    before = {"stages": {"a": {"steps": 1, "rate": [1, 2]}}}
    after = {"stages": {"a": {"steps": 2, "rate": [1, 3], "new": None}}}
    assert [one[:] for one in settings_between(before, after)] == [
        ("stages.a.new", ABSENT, None),
        ("stages.a.rate[1]", 2, 3),
        ("stages.a.steps", 1, 2),
    ]


@pytest.fixture(scope="module")
def ids(finished_run: FinishedRun) -> dict[str, str]:
    return {stage.name: stage.artifact for stage in read_run(Store(finished_run.store), "tiny").stages}


def test_two_models_differ_by_descent_documents_and_likelihood(
    finished_run: FinishedRun, ids: dict[str, str]
) -> None:
    found = difference(Store(finished_run.store), ids["untrained"], ids["fine_tuned"])
    assert found.origins[0].settings[0][:] == ("kind", "new_model", "train")
    assert found.documents and all(after > 0 for _, after in found.documents.values())
    (total,) = [line for line in found.likelihood if line.slice == "total"]
    assert total.result.difference < 0 and total.result.high < 0  # trained: fewer nats
    same = difference(Store(finished_run.store), ids["fine_tuned"], ids["fine_tuned"])
    assert not same.origins and all(one == other for one, other in same.documents.values())


def test_stages_of_one_kind_are_compared_all_the_way_up(
    finished_run: FinishedRun, ids: dict[str, str]
) -> None:
    found = difference(Store(finished_run.store), ids["pretrained"], ids["fine_tuned"])
    by_role = {origin.role: origin for origin in found.origins}
    changed = {one.path: one[1:] for one in by_role["itself"].settings}
    assert changed["rows_per_step"] == (4, 8)
    assert (by_role["data"].before, by_role["data"].after) == (ids["train_tokens"], ids["train_pair_tokens"])
    assert by_role["data/documents"].settings[0][:] == ("kind", "split", "pairs")
    assert "data/tokenizer" not in by_role  # the same one


def test_the_command_line(finished_run: FinishedRun, ids: dict[str, str], gyro: Gyro, tmp_path: Path) -> None:
    where = ("--store", finished_run.store)
    code, out, _ = gyro("diff", ids["untrained"], ids["fine_tuned"], *where)
    assert code == 0 and "documents learned from" in out and "nats per token" in out
    code, out, _ = gyro("diff", ids["untrained"], ids["fine_tuned"], "--json", *where)
    assert json.loads(out)["likelihood"][0]["result"]["groups"] > 1
    code, _, err = gyro("diff", ids["untrained"], ids["train_tokens"], *where)
    assert code == 2 and "is a model, and tokens-" in err
    text = finished_run.recipe.read_text()
    (tmp_path / "other.yaml").write_text(text.replace("steps: 4", "steps: 5"))
    code, out, _ = gyro("diff", finished_run.recipe, tmp_path / "other.yaml", *where)
    assert code == 0 and out.strip() == "stages.pretrained.steps: 4 -> 5"
    code, out, _ = gyro("diff", finished_run.recipe, finished_run.recipe, *where)
    assert code == 0 and out.strip() == "nothing differs"
