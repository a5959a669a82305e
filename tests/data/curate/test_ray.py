"""Curation on Ray comes to what it comes to in processes; needs the extra `ray`."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from curate_steps import built, config
from test_build import TEXTS, lines

from gyrocompass.core.errors import BadInput
from gyrocompass.data.curate.executor import LocalExecutor, RayExecutor

pytest.importorskip("ray", reason="the extra `ray` is not installed")


@pytest.mark.slow
def test_two_ray_workers_give_the_same_artifacts_as_this_process(tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl", TEXTS)
    here = built(config(source), tmp_path / "here", LocalExecutor(1))
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # Ray's own: sockets, futures and deprecated parts of its dependencies
        there = built(config(source), tmp_path / "there", RayExecutor(2), batch_rows=5)
    assert [stage.artifact.id for stage in there.stages] == [stage.artifact.id for stage in here.stages]


def fail(part: int) -> None:
    if part == 3:
        raise BadInput("the third is bad", where="part 3")


@pytest.mark.slow
def test_an_error_for_users_stays_one() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with RayExecutor(2) as executor, pytest.raises(BadInput, match="the third is bad") as raised:
            list(executor.run(fail, range(6)))
    assert type(raised.value) is BadInput and raised.value.where == "part 3"
