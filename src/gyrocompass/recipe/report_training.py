"""What the training stages of a run say of themselves: curves, objective terms, what was drawn, incidents.

    train stages --metrics.jsonl, evaluations.jsonl, incidents.jsonl, ledger.parquet--> [Training]

Shape legend: K steps at which a slice had counted tokens, or at which there was a weight.
"""

from __future__ import annotations

import json
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gyrocompass.core.store import Store
from gyrocompass.data.mixture import PLANNED
from gyrocompass.measure.ledger import Ledger
from gyrocompass.measure.reward_calibration import RewardCalibration, load_calibration
from gyrocompass.recipe.record import RunRecord, StageRecord
from gyrocompass.train.metrics import read_metrics

FloatArray = NDArray[np.float64]
SMOOTHED_PARTS = 25
"""A curve is smoothed over a run's steps divided by this."""
END_PARTS = 10
"""The end of a run is its last steps, one of so many parts."""


class Curve(NamedTuple):
    """One slice's NLL over the steps of a training stage."""

    slice: str
    step_K: FloatArray
    nats_K: FloatArray
    """Nats per token of the step."""
    smooth_K: FloatArray
    """Over the steps around each, weighted by tokens."""
    held_out: list[tuple[int, float]]
    """Evaluations: step, nats per token."""


class ObjectiveTerm(NamedTuple):
    """One named term of the objective, in its own unit."""

    name: str
    settings: str
    terms: int
    """Tokens (or sequences, pairs) with a weight above 0, over the whole run."""
    weight: float
    mean: float | None
    """Over the whole run."""
    at_end: float | None
    """Over the last tenth of the steps; each step counts alike."""


class WeightPath(NamedTuple):
    """How a weight went over the steps of a training stage."""

    of: str
    """"objective", or "tokens of" a slice."""
    name: str
    step_K: FloatArray
    weight_K: FloatArray


class Drawn(NamedTuple):
    """How much of one slice a training stage read."""

    slice: str
    tokens: int
    """Counted targets."""
    share: float
    """Of the counted targets."""
    wanted: float | None
    """The share of input tokens that was planned, by weights, temperature, caps and sizes; None where
    weights move, or where the data stands beside rollouts. Not to be compared with `share`: a slice whose
    inputs are partly context (prompts) has fewer targets than inputs."""


class Forced(NamedTuple):
    """A slice's NLL under gold inputs, where scheduled sampling trained under other ones."""

    slice: str
    first_nats: float
    """Per token, over the first tenth of the steps; each step counts alike."""
    last_nats: float
    """Over the last tenth."""
    own_nats: float
    """Over the last tenth, under the inputs that were trained on: some of them the model's own tokens."""


class Training(NamedTuple):
    """A finished training stage."""

    stage: str
    artifact: str
    settings: dict[str, Any]
    """The stage's config."""
    counts: dict[str, int | float]
    inputs: dict[str, str]
    steps: list[dict[str, Any]]
    """Rows of metrics.jsonl."""
    evaluations: list[dict[str, Any]]
    incidents: list[dict[str, Any]]
    looks: list[dict[str, Any]]
    """Rows of watch.jsonl: what a watch against gamed rewards saw."""
    ledger: Ledger
    calibration: RewardCalibration | None
    """Of a reward model with held-out pairs."""
    planned: dict[str, float]
    """Shares of input tokens by slice; empty where nothing of it was kept."""

    @property
    def smoothed_steps(self) -> int:
        """How many steps around each one a smoothed curve takes in; an odd number."""
        return len(self.steps) // SMOOTHED_PARTS // 2 * 2 + 1

    @property
    def slices(self) -> list[str]:
        """Every slice that was trained on or held out, by name."""
        return sorted({name for row in (*self.steps, *self.evaluations) for name in row["nll_nats"]})

    @property
    def best_step(self) -> int | None:
        """The step whose parameters were kept, where early stopping or a halting watch chose one."""
        keeps_it = self.settings.get("early_stopping") or self.settings.get("watch")
        best = self.counts.get("best_step") if keeps_it else None
        return None if best is None else int(best)

    @property
    def watched(self) -> str:
        """What a watch against gamed rewards made of the run."""
        if not self.looks:
            return ""
        best = max(self.looks, key=lambda look: look["gold"]["value"])
        text = f"The gold reward was highest at step {best['step']}"
        if self.best_step is None:
            return f"{text}; the watch did not halt the run."
        return f"{text}; the watch halted the run after step {self.looks[-1]['step']} and went back there."

    @property
    def clip_norm(self) -> float | None:
        """The norm that gradients were clipped to."""
        clip: float | None = self.settings.get("optimizer", {}).get("clip_norm")
        return clip

    @property
    def tokens_per_second(self) -> float | None:
        """Of the median step."""
        return median(row["tokens_per_second"] for row in self.steps) if self.steps else None

    def curve(self, name: str) -> Curve:
        """The loss of one slice; steps without it, or without a finite loss, are left out."""
        rows = [row for row in self.steps if row["nll_nats"].get(name) is not None]
        step_K = np.array([row["step"] for row in rows], dtype=np.float64)
        nats_K = np.array([row["nll_nats"][name] for row in rows], dtype=np.float64)
        tokens_K = np.array([row["slice_tokens"][name] for row in rows], dtype=np.float64)
        held_out = [
            (row["step"], row["nll_nats"][name])
            for row in self.evaluations
            if row["nll_nats"].get(name) is not None
        ]
        smooth_K = _running_mean(nats_K, tokens_K, self.smoothed_steps)
        return Curve(name, step_K, nats_K, smooth_K, held_out)

    def rollout_terms(self) -> list[tuple[str, float, float]]:
        """What the rollouts were like: name, mean of the first tenth of the steps, and of the last."""
        rows = [row["rollout"] for row in self.steps if "rollout" in row]
        part = max(1, len(rows) // END_PARTS)
        names = dict.fromkeys(name for row in rows for name in row)

        def mean(name: str, some: list[dict[str, float]]) -> float:
            return float(np.mean([row.get(name, np.nan) for row in some]))

        return [(name, mean(name, rows[:part]), mean(name, rows[-part:])) for name in names]

    def teacher_forced(self) -> list[Forced]:
        """By slice; empty without scheduled sampling."""
        key = "teacher_forced_nll_nats"
        rows = [row for row in self.steps if key in row]
        part = max(1, len(rows) // END_PARTS)

        def mean(kind: str, name: str, some: list[dict[str, Any]]) -> float:
            known = [row[kind][name] for row in some if row[kind].get(name) is not None]
            return float(np.mean(known)) if known else float("nan")

        return [
            Forced(
                name,
                mean(key, name, rows[:part]),
                mean(key, name, rows[-part:]),
                mean("nll_nats", name, rows[-part:]),
            )
            for name in sorted({name for row in rows for name in row[key]})
        ]

    def objective_terms(self) -> list[ObjectiveTerm]:
        """Every term of the objective by name."""
        settings = dict(_objective_settings(entry) for entry in self.settings.get("objective", ()))
        last = self.steps[-max(1, len(self.steps) // END_PARTS) :]
        terms = []
        for name, sums in self.ledger.items("objective"):
            ends = [row["objective"][name] for row in last if row["objective"].get(name) is not None]
            terms.append(
                ObjectiveTerm(
                    name,
                    settings.get(name, ""),
                    sums.count,
                    sums.weight,
                    sums.value / sums.weight if sums.weight else None,
                    sum(ends) / len(ends) if ends else None,
                )
            )
        return terms

    def moving_weights(self) -> list[WeightPath]:
        """The weights that changed: of objectives, by a schedule or a controller, and of slices' tokens."""
        paths = []
        for key, of in (("objective_weights", "objective"), ("slice_weights", "tokens of")):
            for name in dict.fromkeys(name for row in self.steps for name in row.get(key, ())):
                points = [(row["step"], row[key][name]) for row in self.steps if name in row.get(key, ())]
                step_K, weight_K = np.array(points, dtype=np.float64).T
                if weight_K.min() < weight_K.max():
                    paths.append(WeightPath(of, name, step_K, weight_K))
        return paths

    def drawn(self) -> list[Drawn]:
        """What was read of each slice."""
        moves = (self.settings.get("curriculum") or {}).get("slices")
        fixed = not moves and not self.settings.get("rollouts")
        wanted = self.planned or self.settings.get("slice_weights") or {} if fixed else {}
        total = self.ledger.total.count
        return [
            Drawn(
                name,
                sums.count,
                sums.count / total,
                wanted.get(name, 0.0) / sum(wanted.values()) if wanted else None,
            )
            for name, sums in self.ledger.items("slice")
        ]


def trainings(record: RunRecord, store: Store) -> list[Training]:
    """The training stages, in the order of the run."""
    return [_training(stage, store) for stage in record.stages if stage.kind == "train"]


def _training(stage: StageRecord, store: Store) -> Training:
    artifact = store.open(stage.artifact, verify=False)
    planned = artifact.path / PLANNED
    return Training(
        stage=stage.name,
        artifact=stage.artifact,
        settings=artifact.manifest.recipe,
        counts=artifact.manifest.counts,
        inputs=stage.inputs,
        steps=read_metrics(artifact.path / "metrics.jsonl"),
        evaluations=read_metrics(artifact.path / "evaluations.jsonl"),
        incidents=read_metrics(artifact.path / "incidents.jsonl"),
        looks=read_metrics(artifact.path / "watch.jsonl"),
        ledger=Ledger.load(artifact.path / "ledger.parquet"),
        calibration=load_calibration(artifact.path),
        planned=json.loads(planned.read_text("utf-8")) if planned.is_file() else {},
    )


def best_of_gap(look: dict[str, Any]) -> float:
    """What the proxy gains by the largest best-of-n, less what gold gains, at one look of a watch."""
    one, most = look["best_of"][0], look["best_of"][-1]
    gap: float = (most["proxy"] - one["proxy"]) - (most["gold"] - one["gold"])
    return gap


def _running_mean(value_K: FloatArray, weight_K: FloatArray, window: int) -> FloatArray:
    """Sum of value * weight over `window` entries around each (fewer at the ends), over that of weight."""
    value_sum_K = np.concatenate([[0.0], np.cumsum(value_K * weight_K)])
    weight_sum_K = np.concatenate([[0.0], np.cumsum(weight_K)])
    at_K = np.arange(len(value_K))
    # At the beginning the curve is steep: a window that reached further forward than back would lie below it.
    half_K = np.minimum(at_K, window // 2)
    start_K, end_K = at_K - half_K, np.minimum(at_K + half_K + 1, len(value_K))
    mean_K: FloatArray = (value_sum_K[end_K] - value_sum_K[start_K]) / (
        weight_sum_K[end_K] - weight_sum_K[start_K]
    )
    return mean_K


def _objective_settings(entry: str | dict[str, Any]) -> tuple[str, str]:
    """What the reports call an entry of the objective, and its parameters as text."""
    if isinstance(entry, str):
        return entry, ""
    [(name, parameters)] = entry.items()
    parameters = dict(parameters or {})
    called = parameters.pop("name", name)
    words = [name] if called != name else []
    return called, ", ".join([*words, *(f"{key} {json.dumps(value)}" for key, value in parameters.items())])
