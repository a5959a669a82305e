"""What differs between two recipes, or between two artifacts and all that they were made from.

    recipe A, recipe B       --settings_between--> every value that is not the same, by its path
    artifact A, artifact B   --difference-------> settings along both lines of descent, by role; documents
                                                  that each model learned from, by slice; figures

Two artifacts are walked up side by side, role by role: `data`, `data/documents`, ... Where both have the same
artifact in a role, nothing above it differs; where stages of one kind made different ones, their settings are
compared, and what these were made from.
Likelihoods are compared where both were scored on the same held-out data, paired by group; figures of tasks
where both were measured, paired by group too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from gyrocompass.core.errors import BadInput
from gyrocompass.core.lineage import walk
from gyrocompass.core.lineage_graph import Node
from gyrocompass.core.store import Store
from gyrocompass.govern.card import learned_from, whole
from gyrocompass.govern.promote import evaluations_of, scores_of
from gyrocompass.measure.alignment import Figure, paired_difference
from gyrocompass.measure.compare import Line, ledger_differences
from gyrocompass.measure.intervals import Estimate
from gyrocompass.measure.ledger import Ledger

ABSENT = "(absent)"


class Setting(NamedTuple):
    """A value that is not the same."""

    path: str
    before: Any
    after: Any


class Origin(NamedTuple):
    """What stands in a role on both sides; None where one has nothing there."""

    role: str
    before: str | None
    after: str | None
    settings: tuple[Setting, ...]


class FigureChange(NamedTuple):
    """A figure on both sides."""

    task: str
    measure: str
    slice: str
    before: Estimate
    after: Estimate
    items: tuple[int, int]
    difference: Estimate | None
    """After less before, on the groups that both have; None: they share none."""


class Difference(NamedTuple):
    """Of two artifacts."""

    before: str
    after: str
    origins: tuple[Origin, ...]
    documents: dict[str, tuple[int, int]]
    """Of models: documents learned from, by slice."""
    likelihood: tuple[Line, ...]
    """Nats per token, after less before."""
    figures: tuple[FigureChange, ...]


def settings_between(before: Any, after: Any, path: str = "") -> Iterator[Setting]:
    """Values that differ, in the order of their paths.

    >>> [*settings_between({"a": {"b": 1}, "c": [1]}, {"a": {"b": 2}, "c": [1], "d": 3})]
    [Setting(path='a.b', before=1, after=2), Setting(path='d', before='(absent)', after=3)]
    """
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for name in sorted({*before, *after}, key=str):
            inner = f"{path}.{name}" if path else str(name)
            yield from settings_between(before.get(name, ABSENT), after.get(name, ABSENT), inner)
    elif _is_list(before) and _is_list(after) and len(before) == len(after):
        for place, (one, other) in enumerate(zip(before, after, strict=True)):
            yield from settings_between(one, other, f"{path}[{place}]")
    elif before != after:
        yield Setting(path, before, after)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def difference(store: Store, before: str, after: str) -> Difference:
    """Compare two artifacts of one kind.

    Raises:
        BadInput: there is none of that id, or they are of two kinds.
    """
    sides = [store.open(name, verify=False) for name in (before, after)]
    kinds = [side.manifest.kind for side in sides]
    if kinds[0] != kinds[1]:
        raise BadInput(f"{sides[0].id} is a {kinds[0]}, and {sides[1].id} is a {kinds[1]}")
    trees = []
    for side in sides:
        tree = walk(store, side.id).artifact
        assert tree is not None, "it was opened"
        trees.append(whole(tree))
    origins = tuple(_origins(trees[0], trees[1], ""))
    if kinds[0] != "model":
        return Difference(sides[0].id, sides[1].id, origins, {}, (), ())
    counts = [learned_from(store, tree).by(0) for tree in trees]
    documents = {name: (counts[0][name], counts[1][name]) for name in sorted({*counts[0], *counts[1]})}
    return Difference(
        sides[0].id,
        sides[1].id,
        origins,
        documents,
        tuple(_likelihood(store, sides[0].id, sides[1].id)),
        tuple(_figures(store, sides[0].id, sides[1].id)),
    )


def _origins(before: Node, after: Node, role: str) -> Iterator[Origin]:
    if before.id == after.id:
        return
    kinds = [node.recipe.get("kind") for node in (before, after)]
    if kinds[0] != kinds[1]:  # of two stages of different kinds, all differs
        yield Origin(role or "itself", before.id, after.id, (Setting("kind", *kinds),))
        return
    settings = tuple(settings_between(dict(before.recipe), dict(after.recipe)))
    if role or settings:
        yield Origin(role or "itself", before.id, after.id, settings)
    sides = [{link.role: link for link in node.links} for node in (before, after)]
    for name in sorted({*sides[0], *sides[1]}):
        one, other = (side.get(name) for side in sides)
        inner = f"{role}/{name}" if role else name
        if one is not None and other is not None:
            yield from _origins(one, other, inner)
        else:
            yield Origin(inner, one.id if one else None, other.id if other else None, ())


def _likelihood(store: Store, before: str, after: str) -> list[Line]:
    own, other = scores_of(store, before), scores_of(store, after)
    both = [data for data in own if data in other]
    if not both:
        return []
    earlier, later = (Ledger.load(side[both[0]].path / "ledger.parquet") for side in (own, other))
    return ledger_differences([(later, earlier)])[0]


def _figures(store: Store, before: str, after: str) -> Iterator[FigureChange]:
    sides = [dict(_measured(store, name)) for name in (before, after)]
    for key in sides[0]:
        if key in sides[1]:
            one, other = sides[0][key], sides[1][key]
            yield FigureChange(
                *key,
                Estimate(one.value, one.low, one.high),
                Estimate(other.value, other.low, other.high),
                (one.size, other.size),
                paired_difference(other, one),
            )


def _measured(store: Store, model_id: str) -> Iterator[tuple[tuple[str, str, str], Figure]]:
    """Figures by task, measure and slice; of several evaluations the last one counts."""
    for _, told in evaluations_of(store, model_id):
        for task in told["tasks"]:
            for line in task["figures"]:
                groups = task["by_group"].get(f"{line['name']}\0{line['slice']}", {})
                sums = {name: (float(pair[0]), int(pair[1])) for name, pair in groups.items()}
                yield (task["name"], line["name"], line["slice"]), Figure(**line, by_group=sums)
