"""Metrics: JSON without NaN, cut back on resume, and in MLflow once each."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from gyrocompass.core.errors import MissingDependency
from gyrocompass.recipe.recipe import Tracking
from gyrocompass.train.metrics import MetricLog, MlflowConfig, MlflowTracker, read_metrics

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # in MLflow's own code
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


def row(step: int, **numbers: Any) -> dict[str, Any]:
    return {"step": step, "time_s": 1000.0 + step, **numbers}


class Remembering:
    """A tracker that keeps what it was told."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def log(self, rows: list[dict[str, Any]]) -> None:
        self.steps += [entry["step"] for entry in rows]

    def last_step(self) -> int:
        return max(self.steps, default=0)

    def close(self) -> None:
        pass


def test_what_is_not_finite_becomes_null(tmp_path: Path) -> None:
    log = MetricLog(tmp_path / "m.jsonl")
    log.append(row(1, loss=math.nan, nll={"code": math.inf}, documents=[{"nats": math.nan}]))
    (read,) = read_metrics(log.path)
    assert read["loss"] is None and read["nll"] == {"code": None} and read["documents"] == [{"nats": None}]
    json.loads(log.path.read_text(), parse_constant=lambda name: pytest.fail(name))


def test_a_line_cut_short_by_a_kill_is_passed_over(tmp_path: Path) -> None:
    log = MetricLog(tmp_path / "m.jsonl")
    for step in range(1, 4):
        log.append(row(step))
    log.path.write_text(log.path.read_text()[:-5])
    assert [entry["step"] for entry in read_metrics(log.path)] == [1, 2]
    log.cut(2)
    log.append(row(3))
    assert [entry["step"] for entry in read_metrics(log.path)] == [1, 2, 3]


def test_the_tracker_hears_of_a_step_once_it_will_not_be_taken_back(tmp_path: Path) -> None:
    tracker = Remembering()
    log = MetricLog(tmp_path / "m.jsonl", tracker)
    log.append(row(1))
    log.append(row(2))
    assert tracker.steps == []
    log.commit()
    log.append(row(3))
    log.cut(2)  # a rewind: step 3 is taken again
    log.append(row(3))
    log.commit()
    assert tracker.steps == [1, 2, 3]


def test_a_kill_between_checkpoint_and_tracker_loses_no_step(tmp_path: Path) -> None:
    tracker = Remembering()
    log = MetricLog(tmp_path / "m.jsonl", tracker)
    for step in range(1, 4):
        log.append(row(step))
        if step == 2:
            log.commit()
    resumed = MetricLog(log.path, tracker)  # the checkpoint of step 3 landed, its commit did not happen
    resumed.cut(3)
    resumed.append(row(4))
    resumed.commit()
    assert tracker.steps == [1, 2, 3, 4]


def test_mlflow_keeps_each_metric_at_its_step(tmp_path: Path) -> None:
    config = MlflowConfig(experiment="test")
    run_file = tmp_path / "run"
    tracker = MlflowTracker(config, tmp_path, run_file, {"stage": "pretrained", "objective": ["nll"]})
    tracker.log([row(1, loss=3.0, nll_nats={"code/library": 2.5, "what?": 1.0}), row(2, loss=2.0)])
    resumed = MlflowTracker(config, tmp_path, run_file, {"stage": "pretrained"})
    assert resumed.run_id == tracker.run_id
    assert resumed.last_step() == 2
    resumed.log([row(3, loss=1.0)])
    resumed.close()
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    run = client.get_run(tracker.run_id)
    assert run.info.status == "FINISHED" and run.data.params["stage"] == "pretrained"
    history = client.get_metric_history(tracker.run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 3.0), (2, 2.0), (3, 1.0)]
    assert run.data.metrics["nll_nats/code/library"] == 2.5 and run.data.metrics["nll_nats/what_"] == 1.0


def test_tracking_is_on_where_mlflow_is_installed_unless_it_is_switched_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert Tracking().mlflow == MlflowConfig()
    assert Tracking.model_validate({"mlflow": None}).mlflow is None
    monkeypatch.setattr("gyrocompass.train.metrics.find_spec", lambda name: None)
    assert Tracking().mlflow is None


def test_without_mlflow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "mlflow", None)
    with pytest.raises(MissingDependency, match=r"mlflow"):
        MlflowTracker(MlflowConfig(), tmp_path, tmp_path / "run", {})
