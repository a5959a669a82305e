"""Promotion as a proof: a rule says what has to hold, the artifacts say whether it does.

    name: careful
    clauses:
      - {kind: likelihood, margin: 0.02}                # nats per token by slice, not worse than the champion
      - {kind: calibration, level: answer, at_most: 0.05}        # debiased error, by its interval's upper end
      - {kind: figure, task: sums, measure: exact_match, at_least: 0.8}     # by its interval's lower end
      - {kind: contamination, at_most: 0.05}
      - {kind: exposure, at_most_bits: 5}
      - {kind: rollout, modes: [canary, ab]}            # was tried on users beside this champion, and kept
      - {kind: latency, quantile: 0.95, at_most_s: 2}   # of its answers so far, by the interval's upper end
      - {kind: approval, by: [ann, bob]}

A clause that cannot be judged, since nothing was measured, does not hold. The decision, with the rule and
all that it was judged by, is an artifact; where every clause holds, `champion` moves in the transaction that
notes it. Measurements are found by lineage: scores, evaluations and calibrations of this very model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import Field
from sqlalchemy import select

from gyrocompass.core.artifact import Artifact
from gyrocompass.core.config import Config, config_hash
from gyrocompass.core.errors import BadInput
from gyrocompass.core.lineage import walk
from gyrocompass.core.lineage_graph import Node
from gyrocompass.core.store import Store
from gyrocompass.core.tables_serving import EventRow
from gyrocompass.govern.registry import Version, champion, crown, versions
from gyrocompass.govern.rollout import rollouts
from gyrocompass.measure.compare import aligned, group_sums, paired
from gyrocompass.measure.ledger import Ledger


class LikelihoodClause(Config):
    """Not worse than the champion on the same held-out documents, in each slice."""

    kind: Literal["likelihood"]
    margin: float = Field(default=0.0, ge=0)
    """Nats per token by which it may be worse ..."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """... with this confidence, one-sided, over groups of documents."""


class CalibrationClause(Config):
    """The debiased calibration error of one level."""

    kind: Literal["calibration"]
    level: Literal["token", "choice", "answer"] = "answer"
    at_most: float = Field(gt=0, lt=1)


class FigureClause(Config):
    """A figure of a task."""

    kind: Literal["figure"]
    task: str
    measure: str
    slice: str = "total"
    at_least: float | None = None
    at_most: float | None = None


class ContaminationClause(Config):
    """Share of each task's items that it may have read."""

    kind: Literal["contamination"]
    at_most: float = Field(ge=0, le=1)


class ExposureClause(Config):
    """Exposure of planted canaries."""

    kind: Literal["exposure"]
    at_most_bits: float = Field(ge=0)


class RolloutClause(Config):
    """It was tried on users beside the champion of now, and its guardrails were shown to hold."""

    kind: Literal["rollout"]
    modes: tuple[Literal["shadow", "canary", "ab"], ...] = ("canary", "ab")


class LatencyClause(Config):
    """How long its answers took, from arrival to the last token, seen or in the shadow."""

    kind: Literal["latency"]
    quantile: float = Field(default=0.95, gt=0, lt=1)
    at_most_s: float = Field(gt=0)


class ApprovalClause(Config):
    """Somebody of these people says yes."""

    kind: Literal["approval"]
    by: tuple[str, ...] = Field(min_length=1)


Clause = Annotated[
    LikelihoodClause
    | CalibrationClause
    | FigureClause
    | ContaminationClause
    | ExposureClause
    | RolloutClause
    | LatencyClause
    | ApprovalClause,
    Field(discriminator="kind"),
]


class PromotionRule(Config):
    """What has to hold."""

    name: str = Field(min_length=1)
    clauses: tuple[Clause, ...] = Field(min_length=1)


class Found(NamedTuple):
    """What became of one clause."""

    clause: dict[str, Any]
    holds: bool
    why: str
    by: tuple[str, ...]
    """Artifacts that it was judged by."""


class Decision(NamedTuple):
    """What came of a rule."""

    artifact: Artifact
    promoted: bool
    clauses: tuple[Found, ...]


Judged = tuple[bool, str, Sequence[str]]
"""Whether a clause holds, why, and by which artifacts."""


def promote(
    store: Store, name: str, version: int, rule: PromotionRule, by: str, approvals: Sequence[str]
) -> Decision:
    """Judge a version by a rule, keep the decision, and make it champion if all holds.

    Args:
        store: with the registry.
        name: registered, of models.
        version: the candidate.
        rule: what has to hold.
        by: who asks for it.
        approvals: who says yes.

    Raises:
        BadInput: there is no such version, or it is champion already.
    """
    candidate = next((one for one in versions(store, name) if one.version == version), None)
    if candidate is None:
        raise BadInput(f"{name} has no version {version}", fix=f"gyro registry list {name}")
    before = champion(store, name)
    if before is not None and before.version == version:
        raise BadInput(f"{name}:{version} is champion already")
    clauses = tuple(_judge(store, clause, candidate, before, approvals) for clause in rule.clauses)
    promoted = all(found.holds for found in clauses)
    about = {
        "rule": rule.model_dump(mode="json"),
        "candidate": candidate._asdict(),
        "champion": None if before is None else before._asdict(),
        "by": by,
        "approvals": list(approvals),
        "clauses": [found._asdict() for found in clauses],
        "promoted": promoted,
    }
    said: dict[str, Any] = rule.model_dump(mode="json")
    parents = {"candidate": store.open(candidate.artifact_id, verify=False)}
    if before is not None:
        parents["champion"] = store.open(before.artifact_id, verify=False)
    with store.create(config_hash(about), "decision", parents=parents, recipe=said) as draft:
        (draft.path / "decision.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
        draft.documents = ()
        draft.counts |= {"clauses": len(clauses), "held": sum(found.holds for found in clauses)}
    if promoted:
        with store.database.write() as connection:
            crown(connection, name, version, draft.artifact.id, by, before)
    return Decision(draft.artifact, promoted, clauses)


def _judge(
    store: Store, clause: Clause, candidate: Version, before: Version | None, approvals: Sequence[str]
) -> Found:
    judges: dict[str, Callable[..., Judged]] = {
        "likelihood": _likelihood,
        "calibration": _calibration,
        "figure": _figure,
        "contamination": _contamination,
        "exposure": _exposure,
        "rollout": _rollout,
        "latency": _latency,
    }
    if isinstance(clause, ApprovalClause):
        yes = sorted(set(approvals) & set(clause.by))
        why = f"approved by {', '.join(yes)}" if yes else f"none of {', '.join(clause.by)} has approved"
        return Found(clause.model_dump(), bool(yes), why, ())
    try:
        holds, why, by = judges[clause.kind](store, clause, candidate, before)
    except BadInput as error:
        holds, why, by = False, error.what, ()
    return Found(clause.model_dump(), holds, why, tuple(by))


def _likelihood(store: Store, clause: LikelihoodClause, candidate: Version, before: Version | None) -> Judged:
    if before is None:
        return True, "there is no champion to be worse than", ()
    own, other = (scores_of(store, one.artifact_id) for one in (candidate, before))
    both = [data for data in own if data in other]
    if not both:
        return False, "the two were not scored on the same held-out data", ()
    mine, theirs = own[both[0]], other[both[0]]
    ledgers = [Ledger.load(one.path / "ledger.parquet") for one in (mine, theirs)]
    worst, slices = "", 0
    for name in [*ledgers[0].names("slice"), None]:
        sums = [group_sums(ledger, name) for ledger in ledgers]
        one_G, other_G, weight_G, groups = aligned(sums[0], sums[1])
        if len(groups) < 2:
            return False, f"{name or 'total'} has fewer than two groups to compare on", (mine.id, theirs.id)
        gap = paired(one_G, other_G, weight_G, confidence=2 * clause.confidence - 1)
        slices += 1
        if gap.high > clause.margin:
            told = f"{name or 'total'}: {gap.difference:+.4f} nats per token, up to {gap.high:+.4f}"
            worst = worst or f"{told}, and {clause.margin:g} is allowed"
    why = worst or f"in {slices} slices not worse than by {clause.margin:g} nats per token"
    return not worst, why, (mine.id, theirs.id)


def scores_of(store: Store, model_id: str) -> dict[tuple[str, ...], Artifact]:
    """Scores and evaluations of a model with a ledger, by the held-out data."""
    found = {}
    for artifact in measured(store, model_id, ("score", "evaluation")):
        parents = artifact.manifest.parents.items()
        data = sorted(one for role, one in parents if role.partition(".")[0] in ("data", "held_out"))
        if data and (artifact.path / "ledger.parquet").is_file():
            found[tuple(data)] = artifact
    return found


def measured(store: Store, model_id: str, kinds: Sequence[str]) -> Iterator[Artifact]:
    """What was measured of a model, or of a copy of it, by lineage."""

    def visit(nodes: Sequence[Node]) -> Iterator[Artifact]:
        for node in nodes:
            kind = node.id.rpartition("-")[0]
            if kind in kinds and node.role in ("model", "evaluation"):
                yield store.open(node.id, verify=False)
            if kind in ("evaluation", "model") and (kind == "evaluation" or node.role == "imported"):
                yield from visit(node.links)

    yield from visit(walk(store, model_id).down)


def evaluations_of(store: Store, model_id: str) -> list[tuple[Artifact, dict[str, Any]]]:
    """Evaluations of a model, and what each found."""
    found = []
    for artifact in measured(store, model_id, ("evaluation",)):
        told = json.loads((artifact.path / "evaluation.json").read_text(encoding="utf-8"))
        found.append((artifact, told))
    return found


def _calibration(
    store: Store, clause: CalibrationClause, candidate: Version, before: Version | None
) -> Judged:
    best: tuple[float, str, str] | None = None
    for artifact in measured(store, candidate.artifact_id, ("calibration",)):
        for entry in json.loads((artifact.path / "calibration.json").read_text(encoding="utf-8")):
            if entry["level"] == clause.level and "after" in entry:
                high = float(entry["after"]["slices"]["total"]["high"])
                if best is None or high < best[0]:
                    best = (high, entry["signal"], artifact.id)
    if best is None:
        return False, f"nothing is calibrated at the level of {clause.level}", ()
    why = (
        f"debiased error of {clause.level} {best[1]} at most {best[0]:.4f}, and {clause.at_most:g} is allowed"
    )
    return best[0] <= clause.at_most, why, (best[2],)


def _figure(store: Store, clause: FigureClause, candidate: Version, before: Version | None) -> Judged:
    for artifact, told in evaluations_of(store, candidate.artifact_id):
        for task in told["tasks"]:
            for line in task["figures"]:
                if (task["name"], line["name"], line["slice"]) == (clause.task, clause.measure, clause.slice):
                    return _within(clause, line, artifact.id)
    return False, f"no evaluation has {clause.measure} of {clause.task} ({clause.slice})", ()


def _within(clause: FigureClause, line: dict[str, Any], artifact_id: str) -> Judged:
    low, high = line["low"], line["high"]
    if low is None or high is None:
        return False, f"{clause.measure} of {clause.task} has no interval", (artifact_id,)
    why = f"{clause.measure} of {clause.task} is {line['value']:.4f} ({low:.4f} to {high:.4f})"
    if clause.at_least is not None and low < clause.at_least:
        return False, f"{why}, and at least {clause.at_least:g} has to be shown", (artifact_id,)
    if clause.at_most is not None and high > clause.at_most:
        return False, f"{why}, and at most {clause.at_most:g} has to be shown", (artifact_id,)
    return True, why, (artifact_id,)


def _contamination(
    store: Store, clause: ContaminationClause, candidate: Version, before: Version | None
) -> Judged:
    rows = [
        (artifact.id, row)
        for artifact, told in evaluations_of(store, candidate.artifact_id)
        for row in told["contamination"]
    ]
    if not rows:
        return False, "no evaluation has looked for items in what it learned from", ()
    name, worst = max(rows, key=lambda one: one[1]["share"])
    why = f"{worst['read']} of {worst['items']} items of {worst['task']} may have been read"
    return worst["share"] <= clause.at_most, why, (name,)


def _exposure(store: Store, clause: ExposureClause, candidate: Version, before: Version | None) -> Judged:
    rows = [
        (artifact.id, row)
        for artifact, told in evaluations_of(store, candidate.artifact_id)
        for row in told["canaries"]
    ]
    if not rows:
        return False, "no evaluation has ranked canaries", ()
    name, worst = max(rows, key=lambda one: one[1]["bits"])
    why = f"the most exposed of {len(rows)} canaries has {worst['bits']:.2f} bits"
    return worst["bits"] <= clause.at_most_bits, why, (name,)


def _rollout(store: Store, clause: RolloutClause, candidate: Version, before: Version | None) -> Judged:
    if before is None:
        return True, "there is no champion to be tried beside", ()
    own = [
        one
        for one in rollouts(store, candidate.name)
        if (one.version, one.champion) == (candidate.version, before.version)
        and one.plan.mode in clause.modes
    ]
    if not own:
        return False, f"it was never tried beside version {before.version} as {' or '.join(clause.modes)}", ()
    last = own[-1]
    return last.state == "kept", f"as {last.plan.mode} it is {last.state}: {last.why or 'no end yet'}", ()


def _latency(store: Store, clause: LatencyClause, candidate: Version, before: Version | None) -> Judged:
    from scipy.stats import binom  # imported here: scipy takes a while

    row = EventRow
    mine = (row.model == candidate.artifact_id, row.status == 200, row.tokens > 0)
    with store.database.read() as connection:
        seconds = np.sort(np.array(list(connection.scalars(select(row.total_s).where(*mine))), np.float64))
    # The quantile is below the k-th smallest with 95% confidence, k the least with P(Bin(n, q) < k) >= 0.95.
    place = int(binom.ppf(0.95, len(seconds), clause.quantile)) if len(seconds) else 0
    if place >= len(seconds):
        need = int(np.ceil(np.log(0.05) / np.log(clause.quantile)))
        return False, f"{len(seconds)} answers are logged, and {need} are needed", ()
    high = float(seconds[place])
    why = f"the {clause.quantile:g} quantile of {len(seconds)} answers is at most {high:.3f} s"
    return high <= clause.at_most_s, f"{why}, and {clause.at_most_s:g} s is allowed", ()
