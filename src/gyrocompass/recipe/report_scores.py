"""The scores of a run, model beside model: what the table, the plot and the headline are made from.

    score stages --ledgers--> [SliceGroup(slice, one row per score stage)]

A row's figures come with 95% intervals over groups, a file with everything derived from it
(`measure.intervals`). Where a stage scored the very documents that the stage before it scored, token for
token, the row also says what changed: the difference is paired by group, so its interval is that of the
difference, and not of two figures side by side.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from gyrocompass.core.store import Store
from gyrocompass.measure.intervals import Estimate, SliceScore, clusters, ratio_estimate, slice_scores
from gyrocompass.measure.ledger import FIELDS, Dimension, Ledger
from gyrocompass.recipe.record import RunRecord, StageRecord

COUNT, VALUE = FIELDS.index("count"), FIELDS.index("value")


class ScoreRow(NamedTuple):
    """What one score stage says of one slice."""

    model: str
    """The stage that made the model; with the score stage's name where the same model is scored twice."""
    score: SliceScore | None
    """None where this stage did not score the slice."""
    change: Estimate | None
    """Nats per token against the row above; None where the two did not score the same tokens."""


class SliceGroup(NamedTuple):
    """One slice, or the total, as every score stage has it."""

    slice: str
    is_total: bool
    rows: list[ScoreRow]

    @property
    def counts(self) -> tuple[int, int, int, int] | None:
        """Documents, groups, tokens and bytes, where all rows stand on the same."""
        scores = [row.score for row in self.rows if row.score]
        counts = {(score.documents, score.groups, score.tokens, score.bytes) for score in scores}
        return counts.pop() if len(counts) == 1 and all(row.score for row in self.rows) else None


class Scored(NamedTuple):
    """What a score stage found."""

    model: str
    ledger: Ledger
    by_slice: dict[str, SliceScore]
    total: SliceScore | None


def score_groups(record: RunRecord, store: Store) -> list[SliceGroup]:
    """Every slice by name, then the total; in each, the score stages in the order of the run."""
    stages = [stage for stage in record.stages if stage.kind == "score"]
    scored = [_scored(stage, label, store) for stage, label in zip(stages, _labels(stages), strict=True)]
    pairs = list(zip([None, *scored], scored, strict=False))
    groups = [
        SliceGroup(
            name,
            False,
            [ScoreRow(one.model, one.by_slice.get(name), nll_change(last, one, name)) for last, one in pairs],
        )
        for name in sorted({name for one in scored for name in one.by_slice})
    ]
    if groups:
        total = [ScoreRow(one.model, one.total, nll_change(last, one, None)) for last, one in pairs]
        groups.append(SliceGroup("total", True, total))
    return groups


def _labels(stages: list[StageRecord]) -> list[str]:
    """The name of each stage's model, made unique by the name of the score stage where it has to be."""
    models = [stage.inputs["model"] for stage in stages]
    times = Counter(models)
    return [
        model if times[model] == 1 else f"{model} ({stage.name})"
        for model, stage in zip(models, stages, strict=True)
    ]


def _scored(stage: StageRecord, label: str, store: Store) -> Scored:
    ledger = Ledger.load(store.open(stage.artifact, verify=False).path / "ledger.parquet")
    lines = slice_scores(ledger)
    return Scored(label, ledger, {line.slice: line for line in lines[:-1]}, lines[-1] if lines else None)


def scored_models(record: RunRecord, store: Store) -> dict[str, Scored]:
    """By the stage that made the model; where a model is scored twice, the first time."""
    found: dict[str, Scored] = {}
    for stage in record.stages:
        if stage.kind == "score" and stage.inputs["model"] not in found:
            found[stage.inputs["model"]] = _scored(stage, stage.inputs["model"], store)
    return found


def nll_change(before: Scored | None, after: Scored, slice_name: str | None) -> Estimate | None:
    """The paired difference in nats per token: (sum of NLL after - before) / tokens of the same groups.

    None where the two did not score the same tokens, or one of them none; a slice of None is all of them.
    """
    if before is None:
        return None
    if _counted(before.ledger, "document", slice_name) != _counted(after.ledger, "document", slice_name):
        return None
    by = clusters(after.ledger)
    counted = _counted(after.ledger, by, slice_name)
    if not counted:
        return None
    if counted != _counted(before.ledger, by, slice_name):
        by = "document"  # only one of the two knows the groups
    before_GF, after_GF = (one.ledger.columns(by, slice_name)[1] for one in (before, after))
    return ratio_estimate(after_GF[:, VALUE] - before_GF[:, VALUE], after_GF[:, COUNT])


def _counted(ledger: Ledger, dimension: Dimension, slice_name: str | None) -> dict[str, float]:
    """Counted tokens by name."""
    names, sums_RF = ledger.columns(dimension, slice_name)
    return dict(zip(names, sums_RF[:, COUNT].tolist(), strict=True))
