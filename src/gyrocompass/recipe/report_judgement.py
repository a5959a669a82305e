"""The report of an evaluation, and of its calibration: one HTML file that needs nothing but itself, and JSON.

    evaluation, calibration, Store --write_judgements--> <stage>.html, <stage>.json beside the run's report
                                   --print_judgements--> the same in short on the terminal

All text of the data (tasks, prompts, answers) is escaped; there is no script and no request.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gyrocompass.core.artifact import Artifact
from gyrocompass.core.folder import write_whole
from gyrocompass.core.store import Store
from gyrocompass.recipe import report_format as fmt
from gyrocompass.recipe.record import RunRecord, StageRecord
from gyrocompass.recipe.stages.calibration import CALIBRATION
from gyrocompass.recipe.stages.evaluation import EVALUATION

if TYPE_CHECKING:
    from jinja2 import Template


class Judgement(NamedTuple):
    """What a page is about."""

    name: str
    """Of the stage."""
    model: str
    """Of the stage that made the model."""
    artifact: Artifact
    evaluation: dict[str, Any]
    calibrations: list[dict[str, Any]]
    """By level and confidence; empty for an evaluation alone."""

    @property
    def best(self) -> dict[str, str]:
        """For each level the confidence that tells right from wrong best, by AUROC."""
        found: dict[str, tuple[float, str]] = {}
        for one in self.calibrations:
            value = one["before"]["slices"]["total"]["auroc"]
            if value is not None and value > found.get(one["level"], (-1.0, ""))[0]:
                found[one["level"]] = (value, one["signal"])
        return {level: signal for level, (_, signal) in found.items()}


def judgements(record: RunRecord, store: Store) -> list[Judgement]:
    """The evaluations and calibrations of a run."""
    return list(_judgements(record, store))


def _judgements(record: RunRecord, store: Store) -> Iterator[Judgement]:
    stages = {stage.name: stage for stage in record.stages}
    for stage in record.stages:
        if stage.kind == "evaluation":
            artifact = store.open(stage.artifact, verify=False)
            yield Judgement(stage.name, _of(stage), artifact, _read(artifact, EVALUATION), [])
        elif stage.kind == "calibration":
            of: StageRecord = stages[stage.inputs["evaluation"]]
            artifact = store.open(stage.artifact, verify=False)
            evaluation = _read(store.open(of.artifact, verify=False), EVALUATION)
            yield Judgement(stage.name, _of(of), artifact, evaluation, _read(artifact, CALIBRATION))


def _of(stage: StageRecord) -> str:
    """Whose evaluation it is: the model's stage; of a server the stage itself."""
    return stage.inputs.get("model", stage.name)


def _read(artifact: Artifact, name: str) -> Any:
    return json.loads((artifact.path / name).read_text(encoding="utf-8"))


# --- the terminal ---


def print_judgements(record: RunRecord, store: Store, console: Console) -> None:
    """Tasks in a table, and what calibration did."""
    for one in judgements(record, store):
        if one.calibrations:
            console.print(_calibration_table(one))
        elif one.evaluation["tasks"]:
            console.print(_task_table(one))


def _task_table(one: Judgement) -> Table:
    table = Table(title=f"{one.model}: tasks", title_justify="left", title_style="bold", box=None)
    for head in ("task", "measure", "slice", "value [95% interval]", "items", "groups"):
        table.add_column(head, overflow="fold")
    for task in one.evaluation["tasks"]:
        for line in task["figures"]:
            value = f"{fmt.figure(line['value'])} {fmt.interval(line['low'], line['high'])}"
            table.add_row(
                Text(task["name"]),
                line["name"],
                Text(line["slice"]),
                value,
                *map(fmt.count, (line["size"], line["groups"])),
            )
    return table


def _calibration_table(one: Judgement) -> Table:
    title = f"{one.model}: calibration, measured on groups that nothing was fitted on"
    table = Table(title=title, title_justify="left", title_style="bold", box=None)
    for head in (
        "confidence",
        "method",
        "debiased ECE before",
        "after",
        "log loss before",
        "after",
        "answers",
    ):
        table.add_column(head, overflow="fold")
    for entry in one.calibrations:
        name = f"{entry['level']}: {entry['signal']}"
        if "method" not in entry:
            table.add_row(name, entry["refused"], "", "", "", "", fmt.count(entry["outcomes"]))
            continue
        before, after = (entry[key]["slices"]["total"] for key in ("before_on_test", "after"))
        table.add_row(
            name,
            entry["method"],
            _error(before),
            _error(after),
            fmt.figure(before["log_loss"]),
            fmt.figure(after["log_loss"]),
            fmt.count(after["answers"]),
        )
    return table


def _error(measured: dict[str, Any]) -> str:
    return f"{fmt.figure(measured['debiased'])} {fmt.interval(measured['low'], measured['high'])}"


# --- the page ---


def write_judgements(record: RunRecord, store: Store, folder: Path) -> list[Path]:
    """Write a page and a JSON file for each evaluation and calibration; the paths of the pages."""
    paths = []
    for one in judgements(record, store):
        page = page_template("judgement.html.j2").render(
            one=one,
            record=record,
            likelihood_plot=_likelihood_plot(one) if one.evaluation["likelihood"] else "",
            sweep_plot=_sweep_plot(one) if one.evaluation.get("sweep") else "",
            diagrams=[(entry, _reliability_plot(entry), _risk_plot(entry)) for entry in one.calibrations],
        )
        path = folder / f"{one.name}.html"
        write_whole(path, page)
        told = {"model": one.model, "evaluation": one.evaluation, "calibration": one.calibrations}
        write_whole(path.with_suffix(".json"), json.dumps(told, indent=1))
        paths.append(path)
    return paths


def page_template(name: str) -> Template:
    """A page's template, with the filters that pages of figures use."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("gyrocompass.recipe", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    names = ("count", "counted", "share", "figure", "signed")
    environment.filters |= {name: getattr(fmt, name) for name in names}
    environment.globals |= {"DASH": fmt.DASH, "interval": fmt.interval}
    return environment.get_template(name)


def _sweep_plot(one: Judgement) -> str:
    from gyrocompass.recipe.svg import both, caption, mark, marker, series

    rows = one.evaluation["sweep"]
    tasks = list(dict.fromkeys(row["task"] for row in rows))

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        caption(axes, "score (up) against self-BLEU (right)")
        axes.grid(color=mark("grid"), linewidth=0.8)
        for place, task in enumerate(tasks):
            own = [row for row in rows if row["task"] == task]
            x = [row["figures"]["self-BLEU"]["value"] for row in own]
            y = [row["figures"]["score"]["value"] for row in own]
            colour = mark(series(place))
            axes.plot(x, y, marker=marker(place), color=colour, linewidth=1, markersize=6)
            for row, across, up in zip(own, x, y, strict=True):
                label = f"{task}: {row['setting']}" if len(tasks) > 1 else row["setting"]
                text = axes.annotate(label, (across, up), xytext=(5, 5), textcoords="offset points")
                text.set_parse_math(False)
                text.set_color(colour)

    return both(f"sweep-{one.name}", "Quality against diversity", 320, draw)


def _likelihood_plot(one: Judgement) -> str:
    from gyrocompass.recipe.svg import both, caption, mark, series

    rows = one.evaluation["likelihood"]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        caption(axes, "nats per token, with 95% intervals over groups")
        axes.grid(visible=False, axis="y")
        axes.grid(axis="x", color=mark("grid"), linewidth=0.8)
        for place, row in enumerate(rows):
            low, high = row["nats_per_token_low"], row["nats_per_token_high"]
            colour = mark("ink") if row["slice"] == "total" else mark(series(place))
            if low is not None:
                axes.plot([low, high], [place, place], color=colour, linewidth=2)
            axes.plot([row["nats_per_token"]], [place], marker="o", color=colour, markersize=6)
        axes.set_yticks(range(len(rows)), [row["slice"] for row in rows], parse_math=False)
        axes.set_ylim(len(rows) - 0.5, -0.5)

    return both(f"likelihood-{one.name}", "Nats per token by slice", 60 + 30 * len(rows), draw)


def _reliability_plot(entry: dict[str, Any]) -> str:
    """Accuracy against confidence, in bins of equal mass, before and after, on the same answers."""
    from gyrocompass.recipe.svg import both, caption, mark, series

    shown = [("as the model says", "before_on_test" if "after" in entry else "before", series(1))]
    if "after" in entry:
        shown.append((f"calibrated ({entry['method']})", "after", series(0)))

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=mark("muted"), linewidth=0.8, linestyle=(0, (4, 3)))
        for label, key, colour in shown:
            bars = entry[key]["bins"]
            x = [bar["confidence"] for bar in bars]
            axes.vlines(
                x,
                [bar["accuracy_low"] for bar in bars],
                [bar["accuracy_high"] for bar in bars],
                color=mark(colour),
                linewidth=1,
                alpha=0.55,
            )
            axes.plot(
                x,
                [bar["accuracy"] for bar in bars],
                marker="o",
                markersize=4,
                color=mark(colour),
                label=label,
            )
        caption(axes, "share that is right, with 95% intervals, against confidence")
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(-0.02, 1.02)
        axes.set_xlabel("confidence", color=mark("muted"))

    return both(f"reliability-{entry['level']}-{entry['signal']}", "Reliability before and after", 340, draw)


def _risk_plot(entry: dict[str, Any]) -> str:
    """The share of wrong answers among those given, against the share that is given."""
    from gyrocompass.recipe.svg import both, caption, mark, series

    key = "after" if "after" in entry else "before"

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        coverage, risk = zip(*entry[key]["curve"], strict=True)
        axes.step(coverage, risk, where="post", color=mark(series(0)), linewidth=1.5)
        promise = entry.get("guarantee")
        if promise and "risk" in promise:
            axes.axhline(promise["risk"], color=mark("muted"), linewidth=0.8, linestyle=(0, (4, 3)))
        caption(axes, "share of wrong answers among those given")
        axes.set_xlim(0, 1.02)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("share of answers given, the most confident first", color=mark("muted"))

    return both(f"risk-{entry['level']}-{entry['signal']}", "Risk and coverage", 260, draw)
