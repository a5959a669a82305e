"""Two recipes, or two models, on the same held-out documents: what differs, and what it costs.

    records of A and B, one for each seed --compare--> Comparison: lines by slice, cost

A line is the paired difference of A and B in nats per token, over the groups of documents that both scored:
sums over the seeds, so a group that is drawn by the bootstrap brings all of its seeds. How much the
difference varies from seed to seed stands beside it: with few seeds, that is what to look at first, and no
interval over documents says it. The p-value of n groups is never below 2 / 2^n: with five, nothing is shown.

Where both recipes calibrate, the debiased errors of the last calibration stand there too, without an interval
of their difference.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gyrocompass.core.errors import BadInput
from gyrocompass.core.folder import write_whole
from gyrocompass.core.store import Store
from gyrocompass.measure.compare import Line, ledger_differences
from gyrocompass.measure.ledger import Ledger
from gyrocompass.recipe import report_format as fmt
from gyrocompass.recipe.recipe import Recipe
from gyrocompass.recipe.record import RunRecord
from gyrocompass.recipe.report_judgement import judgements, page_template
from gyrocompass.recipe.stages.train import TrainStage


class Cost(NamedTuple):
    """What all training of a recipe took, over its seeds."""

    tokens: int
    """That were learned from."""
    steps: int


class Comparison(NamedTuple):
    """What two recipes differ in: A less B."""

    names: tuple[str, str]
    lines: list[Line]
    by_seed: dict[str, list[float]]
    """The difference of each seed, by slice."""
    costs: tuple[Cost, Cost]
    calibration: dict[str, tuple[float, float]]
    """Debiased calibration errors of both, by level and confidence."""


def seeded(recipe: Recipe, seed: int) -> Recipe:
    """The recipe with other seeds of its models and its training; 0: as it is."""
    if seed == 0:
        return recipe
    stages = {
        name: stage.model_copy(update={"seed": stage.seed + seed})
        if stage.kind in ("train", "new_model") and hasattr(stage, "seed")
        else stage
        for name, stage in recipe.stages.items()
    }
    return recipe.model_copy(update={"stages": stages, "name": f"{recipe.name}-seed{seed}"})


def compare(a: Sequence[RunRecord], b: Sequence[RunRecord], store: Store) -> Comparison:
    """Compare the last scores of two recipes, seed by seed.

    Raises:
        BadInput: a recipe scores nothing, or not the same documents.
    """
    pairs = [(_ledger(one, store), _ledger(other, store)) for one, other in zip(a, b, strict=True)]
    names = (a[0].recipe, b[0].recipe)
    found, by_seed = ledger_differences(pairs)
    return Comparison(
        names, found, by_seed, (_cost(a, store), _cost(b, store)), _calibration(a[0], b[0], store)
    )


def _ledger(record: RunRecord, store: Store) -> Ledger:
    scored = [stage for stage in record.stages if stage.kind == "score"]
    if not scored:
        raise BadInput(
            f"the recipe {record.recipe} scores nothing", fix="add a stage of kind score at its end"
        )
    return Ledger.load(store.open(scored[-1].artifact, verify=False).path / "ledger.parquet")


def _cost(records: Sequence[RunRecord], store: Store) -> Cost:
    tokens = steps = 0
    for record in records:
        for stage in record.stages:
            if stage.kind == TrainStage.model_fields["kind"].default:
                folder = store.open(stage.artifact, verify=False).path
                tokens += Ledger.load(folder / "ledger.parquet").total.count
                steps += len((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return Cost(tokens, steps)


def _calibration(a: RunRecord, b: RunRecord, store: Store) -> dict[str, tuple[float, float]]:
    found: list[dict[str, float]] = []
    for record in (a, b):
        own = {}
        for judged in judgements(record, store):
            for entry in judged.calibrations:
                if "after" in entry:
                    error = entry["after"]["slices"]["total"]["debiased"]
                    own[f"{entry['level']}: {entry['signal']}"] = error
        found.append(own)
    return {name: (found[0][name], found[1][name]) for name in found[0] if name in found[1]}


# --- what people see ---


def print_comparison(found: Comparison, console: Console) -> None:
    """The table, and how the difference varies from seed to seed."""
    a, b = found.names
    title = f"{a} less {b}: nats per token, paired by group; p-values corrected over all lines (Holm)"
    table = Table(title=title, title_justify="left", title_style="bold", box=None)
    for head in ("slice", "difference [95%]", f"{a} is", "p", "by seed", "groups", "tokens"):
        table.add_column(head, overflow="fold")
    for line in found.lines:
        result = line.result
        table.add_row(
            Text(line.slice),
            f"{fmt.signed(result.difference)} {fmt.interval(result.low, result.high)}",
            line.verdict(),
            fmt.figure(line.p_adjusted),
            ", ".join(fmt.signed(one) for one in found.by_seed[line.slice]),
            fmt.count(result.groups),
            fmt.count(result.weight),
        )
    console.print(table)
    for name, cost in zip(found.names, found.costs, strict=True):
        if cost.steps:
            console.print(
                f"{name}: learned from {fmt.count(cost.tokens)} tokens in {fmt.count(cost.steps)} steps"
            )
    for name, (one, other) in found.calibration.items():
        console.print(f"debiased calibration error, {name}: {fmt.figure(one)} and {fmt.figure(other)}")


def write_page(found: Comparison, path: Path) -> None:
    """The same as a page."""
    costs = [(name, cost) for name, cost in zip(found.names, found.costs, strict=True) if cost.steps]
    seeds = len(next(iter(found.by_seed.values())))
    page = page_template("comparison.html.j2").render(
        found=found, costs=costs, seeds=seeds, plot=_difference_plot(found)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, page)


def _difference_plot(found: Comparison) -> str:
    from gyrocompass.recipe.svg import both, caption, mark, series

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        caption(axes, "nats per token, with 95% intervals; dots: seeds")
        axes.grid(visible=False, axis="y")
        axes.grid(axis="x", color=mark("grid"), linewidth=0.8)
        axes.axvline(0, color=mark("muted"), linewidth=1)
        for place, line in enumerate(found.lines):
            colour = mark("ink") if line.slice == "total" else mark(series(place))
            axes.plot([line.result.low, line.result.high], [place, place], color=colour, linewidth=2)
            axes.plot([line.result.difference], [place], marker="D", color=colour, markersize=6)
            seeds = found.by_seed[line.slice]
            if len(seeds) > 1:
                axes.plot(seeds, [place + 0.18] * len(seeds), ".", color=mark("muted"))
        axes.set_yticks(range(len(found.lines)), [line.slice for line in found.lines], parse_math=False)
        axes.set_ylim(len(found.lines) - 0.5, -0.5)

    return both("difference", "Difference by slice", 60 + 34 * len(found.lines), draw)


def write_comparison(found: Comparison, path: Path) -> None:
    """The same as JSON."""
    told: dict[str, Any] = {
        "a": found.names[0],
        "b": found.names[1],
        "lines": [
            {
                "metric": line.metric,
                "slice": line.slice,
                **line.result._asdict(),
                "p_adjusted": line.p_adjusted,
                "verdict": line.verdict(),
                "by_seed": found.by_seed[line.slice],
            }
            for line in found.lines
        ],
        "costs": [cost._asdict() for cost in found.costs],
        "calibration": found.calibration,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(told, indent=1))
