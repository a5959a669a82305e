"""Alignment in a run's report: model beside model, each difference paired, and samples before and after.

    alignment stages --alignment.json--> Measured (a row per measure, a cell per model), samples side by side

The first alignment stage is what the others are compared with. A difference is on the same pairs or prompts,
clustered by group; where its interval holds 0, the report says that nothing was shown.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from gyrocompass.core.store import Store
from gyrocompass.measure.alignment import ALIGNMENT, Calibration, Figure, figures_from, paired_difference
from gyrocompass.measure.intervals import Estimate
from gyrocompass.recipe.record import RunRecord, StageRecord

FEWER_IS_BETTER = ("sample: cut off", "sample: KL from reference, nats")
NO_DIRECTION = ("sample: tokens", "sample: KL from reference, nats")
"""Measures that tell how a model changed, and not whether it got better."""


class Cell(NamedTuple):
    """A measure of one model."""

    figure: Figure | None
    change: Estimate | None
    """Against the first model that has the measure; None for that one, or where nothing is shared."""

    @property
    def verdict(self) -> str:
        """What the change shows: "better", "worse", "no difference shown", or nothing to say."""
        if self.change is None or self.change.low is None or self.change.high is None or self.figure is None:
            return ""
        if self.figure.name in NO_DIRECTION:
            return ""
        if self.change.low <= 0 <= self.change.high:
            return "no difference shown"
        rose = self.change.low > 0
        return "better" if rose != (self.figure.name in FEWER_IS_BETTER) else "worse"


class Measured(NamedTuple):
    """One measure, model by model."""

    name: str
    cells: list[Cell]


class Judged(NamedTuple):
    """One model's alignment stage."""

    model: str
    figures: dict[str, Figure]
    """By name, over all slices."""
    calibration: Calibration | None
    samples: list[dict[str, str]]


def judged_models(record: RunRecord, store: Store) -> list[Judged]:
    """The alignment stages, in the order of the run."""
    return [_judged(stage, store) for stage in record.stages if stage.kind == "alignment"]


def measures(judged: list[Judged]) -> list[Measured]:
    """Every measure that a model has, in the order they are first met."""
    names = list(dict.fromkeys(name for one in judged for name in one.figures))
    found = []
    for name in names:
        first = next(one.figures[name] for one in judged if name in one.figures)
        cells = [_cell(one.figures.get(name), first) for one in judged]
        found.append(Measured(name, cells))
    return found


def side_by_side(judged: list[Judged]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Prompts with what each model wrote: (prompt, [(model, completion)])."""
    by_prompt: dict[str, list[tuple[str, str]]] = {}
    for one in judged:
        for sample in one.samples:
            by_prompt.setdefault(sample["prompt"], []).append((one.model, sample["completion"]))
    return list(by_prompt.items())


def _cell(figure: Figure | None, first: Figure) -> Cell:
    if figure is None or figure is first:
        return Cell(figure, None)
    return Cell(figure, paired_difference(figure, first))


def _judged(stage: StageRecord, store: Store) -> Judged:
    artifact = store.open(stage.artifact, verify=False)
    found: dict[str, Any] = json.loads((artifact.path / ALIGNMENT).read_text(encoding="utf-8"))
    figures = {figure.name: figure for figure in figures_from(found["figures"]) if figure.slice == "total"}
    fitted = found["calibration"]
    calibration = None if fitted is None else Calibration(**fitted)
    return Judged(stage.inputs["model"], figures, calibration, found["samples"])
