"""Where the numbers of a run go: a JSONL file, always, and MLflow when it is configured.

Both hold each step once, also after a kill or a rewind: the file is cut back to the step that training goes
on from, and MLflow is told of steps only once the checkpoint behind them has landed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from gyrocompass.core.config import Config
from gyrocompass.core.errors import MissingDependency

MLFLOW_BATCH = 1000


class MlflowConfig(Config):
    """Track the run in MLflow: by default in its own SQLite store beside the artifacts, else at `uri`."""

    uri: str | None = None
    experiment: str = "gyrocompass"


class Tracker(Protocol):
    """Whoever wants to know of steps that will not be taken back."""

    def last_step(self) -> int:
        """The last step it was told of; 0 where there is none."""

    def log(self, rows: list[dict[str, Any]]) -> None:
        """Take the rows of steps that a checkpoint now stands behind."""

    def close(self) -> None:
        """The run is over."""


class MetricLog:
    """One JSON object per step, in a file; committed rows are handed to the tracker."""

    def __init__(self, path: Path, tracker: Tracker | None = None) -> None:
        self.path = path
        self._tracker = tracker
        self._uncommitted: list[dict[str, Any]] = []

    def append(self, row: dict[str, Any]) -> None:
        """Write one row; a NaN is written as null (JSON has no NaN)."""
        clean = {key: _finite(value) for key, value in row.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(clean) + "\n")
        self._uncommitted.append(clean)

    def commit(self) -> None:
        """A checkpoint stands behind every row so far."""
        if self._tracker is not None and self._uncommitted:
            self._tracker.log(self._uncommitted)
        self._uncommitted = []

    def cut(self, step: int) -> None:
        """Drop the rows after `step`: training goes on from there.

        Rows up to `step` that a kill kept from the tracker are told with the next commit.
        """
        self.keep(lambda row: row["step"] <= step)

    def keep(self, stands: Callable[[dict[str, Any]], bool]) -> None:
        """Drop the rows that do not stand any more."""
        kept = [row for row in read_metrics(self.path) if stands(row)]
        self._uncommitted = []
        if self._tracker is not None:
            told = self._tracker.last_step()
            self._uncommitted = [row for row in kept if row["step"] > told]
        if not kept:
            self.path.unlink(missing_ok=True)  # as in a run that never wrote a row
            return
        temporary = self.path.with_suffix(".cut")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        temporary.replace(self.path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a line cut short by a kill is passed over (its step is run again)."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return {key: _finite(inner) for key, inner in value.items()} if isinstance(value, dict) else value


class MlflowTracker:
    """One MLflow run; a resumed run goes on in the one whose id stands in `run_file`."""

    def __init__(
        self, config: MlflowConfig, store: Path, run_file: Path, parameters: Mapping[str, Any]
    ) -> None:
        try:
            from mlflow import MlflowClient
        except ImportError as error:
            raise MissingDependency("mlflow", extra="mlflow", needed_for="tracking in MLflow") from error
        uri = config.uri or f"sqlite:///{store / 'mlflow.db'}"
        self._client = MlflowClient(tracking_uri=uri)
        if run_file.exists():
            self.run_id = run_file.read_text(encoding="utf-8")
            return
        self.run_id = self._start(config.experiment, parameters)
        run_file.write_text(self.run_id, encoding="utf-8")

    def _start(self, experiment: str, parameters: Mapping[str, Any]) -> str:
        found = self._client.get_experiment_by_name(experiment)
        experiment_id = found.experiment_id if found else self._client.create_experiment(experiment)
        run_id: str = self._client.create_run(experiment_id).info.run_id
        for name, value in parameters.items():
            self._client.log_param(run_id, name, str(value)[:500])
        return run_id

    def last_step(self) -> int:
        """The last step whose loss is there."""
        history = self._client.get_metric_history(self.run_id, "loss")
        return max((metric.step for metric in history), default=0)

    def log(self, rows: list[dict[str, Any]]) -> None:
        """Send the numbers of each row, nested ones as `a/b`."""
        from mlflow.entities import Metric

        metrics = [
            Metric(name, value, round(row["time_s"] * 1000), row["step"])
            for row in rows
            for name, value in _numbers(row)
        ]
        for start in range(0, len(metrics), MLFLOW_BATCH):
            self._client.log_batch(self.run_id, metrics[start : start + MLFLOW_BATCH])

    def close(self) -> None:
        """Mark the run finished."""
        self._client.set_terminated(self.run_id)


def _numbers(row: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    numbers: list[tuple[str, float]] = []
    for key, value in row.items():
        if isinstance(value, dict):
            numbers += _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and key not in ("step", "time_s"):
            numbers.append((re.sub(r"[^\w\-./: ]", "_", f"{prefix}{key}"), float(value)))
    return numbers
