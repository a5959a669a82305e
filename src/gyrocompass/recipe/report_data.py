"""The data a run was made from: documents, bytes, tokens, counted targets by slice, and what was set aside.

    manifests of document and token stages --> [DataGroup(one line per slice)], quarantined with reasons

Documents that were tokenised stand in one group with their tokens. What each group was used for (learned
from, held out) is read from the stages that take it in, not from its name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from gyrocompass.core.store import Store
from gyrocompass.data.document import QUARANTINED, read_quarantined
from gyrocompass.recipe.record import RunRecord, StageRecord

Counts = Mapping[str, int | float]


class SliceData(NamedTuple):
    """One slice of a data set; None where the stages do not say."""

    slice: str
    documents: float | None
    bytes: float | None
    tokens: float | None
    targets: float | None
    """Tokens that are counted: those with a weight above 0."""


class Reason(NamedTuple):
    """Why records were quarantined, how many, and where the first of them stands."""

    stage: str
    reason: str
    records: int
    example: str


class DataGroup(NamedTuple):
    """One data set: the stages it stands in, what it was used for, and its slices."""

    stages: list[str]
    used: list[str]
    slices: list[SliceData]
    total: SliceData
    quarantined: float | None
    """Records of its stages that could not be used."""
    skipped: float | None
    """Files or records left out by rule."""


class DataFacts(NamedTuple):
    """All data of a run."""

    groups: list[DataGroup]
    reasons: list[Reason]


def data_facts(record: RunRecord, store: Store) -> DataFacts:
    """Read the manifests of every document and token artifact of a run, and their quarantine."""
    stages = {stage.name: stage for stage in record.stages}
    artifacts = {name: store.open(stage.artifact, verify=False) for name, stage in stages.items()}
    counts = {
        name: artifact.manifest.counts
        for name, artifact in artifacts.items()
        if artifact.manifest.kind in ("documents", "tokens")
    }
    source = {
        name: stages[name].inputs.get("documents", "") for name in counts if stages[name].kind == "tokens"
    }
    groups = []
    for name in counts:
        if name in source:
            groups.append(_group([source[name], name], counts, record.stages))
        elif name not in source.values():
            groups.append(_group([name], counts, record.stages))
    reasons = [reason for name in counts for reason in _reasons(name, artifacts[name].path)]
    return DataFacts(groups, reasons)


def _group(names: Sequence[str], counts: Mapping[str, Counts], stages: Sequence[StageRecord]) -> DataGroup:
    """A data set from its document stage and, where there is one, its token stage."""
    names = [name for name in names if name in counts]
    merged: dict[str, float] = {}
    for name in reversed(names):
        merged |= counts[name]
    tokenised = any("targets" in counts[name] for name in names)
    found = {key.split("/", 1)[1] for key in merged if key.startswith(("documents/", "targets/"))}
    return DataGroup(
        stages=names,
        used=_used(names[-1], stages),
        slices=[_slice(name, merged, f"/{name}", tokenised) for name in sorted(found)],
        total=_slice("total", merged, "", tokenised),
        quarantined=_sum(counts[name].get("quarantined") for name in names),
        skipped=_sum(counts[name].get("skipped") for name in names),
    )


def _slice(name: str, counts: Counts, suffix: str, tokenised: bool) -> SliceData:
    # A slice of which every document was set aside has no count of targets: it has none.
    nothing = 0 if tokenised else None
    return SliceData(
        name,
        counts.get(f"documents{suffix}"),
        counts.get(f"bytes{suffix}"),
        counts.get(f"tokens{suffix}"),
        counts.get(f"targets{suffix}", nothing),
    )


def _sum(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


_USES = {("train", "data"): "learned from by", ("train", "held_out"): "watched, not learned from, by"}


def _used(name: str, stages: Sequence[StageRecord]) -> list[str]:
    """What a data set was used for, in the order of the run."""
    used: dict[str, list[str]] = {}
    for stage in stages:
        for role, source in stage.inputs.items():
            use = "scored by" if stage.kind == "score" else _USES.get((stage.kind, role))
            if source == name and use:
                used.setdefault(use, []).append(stage.name)
    return [f"{use} {', '.join(names)}" for use, names in used.items()]


def _reasons(stage: str, folder: Path) -> list[Reason]:
    if not (folder / QUARANTINED).is_file():
        return []
    times: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for row in read_quarantined(folder):
        times[row.reason] += 1
        examples.setdefault(row.reason, row.path if row.line is None else f"{row.path}:{row.line}")
    return [Reason(stage, reason, count, examples[reason]) for reason, count in times.most_common()]
