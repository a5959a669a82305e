"""What each stage of training changed, in a run's report: a line per measure, each change with what it shows.

    score stages, alignment stages --by model--> figures before and after --> Line, ...
    a line's change, paired ---------> better | worse | no difference shown

A model is compared with the one that its stage began with. A change in nats per token is paired by the groups
of the held-out documents, one in preferences or samples by the groups of the pairs or prompts. Where the
interval of a change holds 0, nothing was shown, and the report says so. A share of preferred answers that has
nothing before it is compared with chance, one half.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from gyrocompass.core.store import Store
from gyrocompass.measure.alignment import (
    ALIGNMENT,
    BY_RATIO,
    CUT_OFF,
    DISTANCE,
    PREFERRED,
    Calibration,
    Figure,
    figures_from,
    paired_difference,
)
from gyrocompass.measure.intervals import Estimate
from gyrocompass.recipe.record import RunRecord, StageRecord
from gyrocompass.recipe.report_scores import Scored, nll_change, scored_models

FEWER_IS_BETTER = (CUT_OFF,)
NO_DIRECTION = ("sample: tokens", DISTANCE)
"""Measures that tell how a model changed, and not whether it got better."""
NOTHING = "no difference shown"
CHANCE = 0.5


class Line(NamedTuple):
    """One measure of a model, beside what it was."""

    measure: str
    before: Estimate | None
    """None where the model that the stage began with has no such figure, or there is none."""
    after: Estimate
    change: Estimate | None
    verdict: str
    """better, worse, no difference shown; of a share alone: above chance, below chance, chance not excluded;
    empty where the measure has no direction."""
    counted: str
    """What it is a mean of: tokens, pairs, samples."""
    size: int
    groups: int


class Changed(NamedTuple):
    """What a stage made of the model that it began with."""

    model: str
    base: str | None
    lines: list[Line]
    calibration: Calibration | None
    left_out: dict[str, str]
    """Rewards that could not be computed on this machine, and why."""

    @property
    def summary(self) -> str:
        """What was shown, in a sentence or two."""
        named = {
            verdict: [line.measure for line in self.lines if line.verdict == verdict]
            for verdict in dict.fromkeys(line.verdict for line in self.lines if line.verdict)
        }
        said = [
            f"{verdict}: {', '.join(names)}"
            if verdict != NOTHING
            else f"{NOTHING}: {len(names)} of {self._judged}"
            for verdict, names in named.items()
        ]
        if any(line.change for line in self.lines) and not named.keys() & {"better", "above chance"}:
            said.insert(0, f"{self.model} is better by no measure here")
        return "; ".join(said)

    @property
    def _judged(self) -> int:
        return sum(bool(line.verdict) for line in self.lines)


class _Judged(NamedTuple):
    """An alignment stage."""

    model: str
    is_reference: bool
    """Whether it is what distances were measured from: they are 0 by themselves."""
    figures: dict[str, Figure]
    """By name, over all slices."""
    calibration: Calibration | None
    samples: list[dict[str, str]]
    left_out: dict[str, str]


def changes(record: RunRecord, store: Store) -> list[Changed]:
    """Every model that was judged by an alignment stage, in the order of the run."""
    judged, scored = _judged_models(record, store), scored_models(record, store)
    bases = {stage.name: stage.inputs["model"] for stage in record.stages if stage.kind == "train"}
    found = []
    for label, one in judged.items():
        base = bases.get(one.model)
        before = judged.get(base) if base else None
        lines = _nll_lines(scored.get(base) if base else None, scored.get(one.model))
        lines += [
            _line(figure, before.figures.get(name) if before else None)
            for name, figure in one.figures.items()
            if not (one.is_reference and name in (BY_RATIO, DISTANCE))
        ]
        found.append(Changed(label, base, lines, one.calibration, one.left_out))
    return found


def side_by_side(record: RunRecord, store: Store) -> list[tuple[str, list[tuple[str, str]]]]:
    """Prompts with what each model wrote: (prompt, [(model, completion)])."""
    by_prompt: dict[str, list[tuple[str, str]]] = {}
    for model, one in _judged_models(record, store).items():
        for sample in one.samples:
            by_prompt.setdefault(sample["prompt"], []).append((model, sample["completion"]))
    return list(by_prompt.items())


def _nll_lines(before: Scored | None, after: Scored | None) -> list[Line]:
    if after is None:
        return []
    lines = []
    for score in [*after.by_slice.values(), *([after.total] if after.total else [])]:
        slice_name = None if score is after.total else score.slice
        earlier = None
        if before is not None:
            earlier = before.total if slice_name is None else before.by_slice.get(slice_name)
        change = nll_change(before, after, slice_name)
        lines.append(
            Line(
                f"nats per token ({score.slice})",
                None if earlier is None else _nats(earlier),
                _nats(score),
                change,
                _verdict(change, fewer_is_better=True),
                "tokens",
                score.tokens,
                score.groups,
            )
        )
    return lines


def _nats(score: Any) -> Estimate:
    return Estimate(score.nats_per_token, score.nats_per_token_low, score.nats_per_token_high)


def _line(figure: Figure, before: Figure | None) -> Line:
    change = None if before is None else paired_difference(figure, before)
    if figure.name in NO_DIRECTION:
        verdict = ""
    elif before is None and figure.name.startswith(PREFERRED):
        verdict = _against_chance(figure)
    else:
        verdict = _verdict(change, fewer_is_better=figure.name in FEWER_IS_BETTER)
    return Line(
        figure.name.removeprefix("sample: "),
        None if before is None else _estimate(before),
        _estimate(figure),
        change,
        verdict,
        "pairs" if figure.name.startswith(PREFERRED) else "samples",
        figure.size,
        figure.groups,
    )


def _estimate(figure: Figure) -> Estimate:
    return Estimate(figure.value, figure.low, figure.high)


def _verdict(change: Estimate | None, *, fewer_is_better: bool) -> str:
    if change is None or change.low is None or change.high is None:
        return ""
    if change.low <= 0 <= change.high:
        return NOTHING
    return "worse" if (change.low > 0) == fewer_is_better else "better"


def _against_chance(figure: Figure) -> str:
    if figure.low is None or figure.high is None:
        return ""
    if figure.low <= CHANCE <= figure.high:
        return "chance not excluded"
    return "above chance" if figure.low > CHANCE else "below chance"


def _judged_models(record: RunRecord, store: Store) -> dict[str, _Judged]:
    """By model, with the stage's name where a model was judged before."""
    found: dict[str, _Judged] = {}
    for stage in record.stages:
        if stage.kind == "alignment":
            model = stage.inputs["model"]
            found[model if model not in found else f"{model} ({stage.name})"] = _judged(stage, store)
    return found


def _judged(stage: StageRecord, store: Store) -> _Judged:
    artifact = store.open(stage.artifact, verify=False)
    found: dict[str, Any] = json.loads((artifact.path / ALIGNMENT).read_text(encoding="utf-8"))
    figures = {figure.name: figure for figure in figures_from(found["figures"]) if figure.slice == "total"}
    fitted = found["calibration"]
    calibration = None if fitted is None else Calibration(**fitted)
    is_reference = stage.inputs["model"] == stage.inputs.get("reference")
    left_out = found.get("left_out", {})
    return _Judged(stage.inputs["model"], is_reference, figures, calibration, found["samples"], left_out)
