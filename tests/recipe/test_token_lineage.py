"""`gyro lineage --token`: from a position of a step to the bytes of a file."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from gyrocompass.core.store import Store
from gyrocompass.data.document import read_documents
from gyrocompass.recipe.run import read_run
from tiny_recipe import FinishedRun

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def artifacts(finished_run: FinishedRun) -> dict[str, str]:
    record = read_run(Store(finished_run.store), None)
    return {stage.name: stage.artifact for stage in record.stages}


def test_a_token_is_found_in_its_file(
    finished_run: FinishedRun, artifacts: dict[str, str], gyro: Run
) -> None:
    store = Store(finished_run.store)
    documents = {d.id: d for d in read_documents(store.open(artifacts["train_documents"]).path)}
    seen = set()
    for step, position in ((1, 0), (2, 17), (3, 100), (4, 70)):
        code, out, err = gyro(
            "lineage", "--token", artifacts["pretrained"], step, position, "--store", finished_run.store
        )
        assert code == 0, err
        if "padding" in out:
            continue
        document = documents[re.findall(r"of document (\w+)", out)[0]]
        assert document.path in out
        number, shown, begin, end = re.findall(r"predicted (\d+) (.*), bytes (\d+) to (\d+), weight 1", out)[
            0
        ]
        assert document.text.encode()[int(begin) : int(end)].decode("utf-8", "replace") == eval(shown)
        seen.add(number)
    assert seen


def test_a_pair_says_what_it_was_derived_from(
    finished_run: FinishedRun, artifacts: dict[str, str], gyro: Run
) -> None:
    code, out, err = gyro("lineage", "--token", artifacts["fine_tuned"], 1, 3, "--store", finished_run.store)
    assert code == 0 and "derived from" in out, err


def test_what_has_no_trace_or_no_such_step_is_refused(
    finished_run: FinishedRun, artifacts: dict[str, str], gyro: Run
) -> None:
    store = ("--store", finished_run.store)
    code, _, err = gyro("lineage", "--token", artifacts["untrained"], 1, 0, *store)
    assert code == 2 and "keeps no trace" in err
    code, _, err = gyro("lineage", "--token", artifacts["pretrained"], 5, 0, *store)
    assert code == 2 and "there is no step 5" in err and "from 1 to 4" in err
    code, _, err = gyro("lineage", "--token", artifacts["pretrained"], "x", 0, *store)
    assert code == 2 and "not a whole number" in err
    assert gyro("lineage", *store)[0] == 2
    assert gyro("lineage", "x", "--token", "y", 1, 2, *store)[0] == 2
