"""The report of a run: a table on the terminal, and one HTML file that needs nothing but itself.

    RunRecord + Store --print_report--> scores, completions and incidents on the terminal
    RunRecord + Store --write_report--> report.html: inline CSS and SVG, no script, no request

Everything is read from the store, so a report can be made again at any time. All text of the data (paths,
slices, prompts, completions) is escaped. Every metric stands beside its count and every estimate beside its
interval; what was not measured is a dash.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gyrocompass.core.artifact import Artifact
from gyrocompass.core.folder import write_whole
from gyrocompass.core.lineage import walk
from gyrocompass.core.store import Store
from gyrocompass.measure.intervals import Estimate
from gyrocompass.measure.table import MEASURES, Measure, estimate, plain_table, print_fitting, with_interval
from gyrocompass.recipe import report_format as fmt
from gyrocompass.recipe.record import RunRecord, StageRecord
from gyrocompass.recipe.report_alignment import Changed, Line, changes, side_by_side
from gyrocompass.recipe.report_completions import CompletionGroup, completion_groups
from gyrocompass.recipe.report_data import data_facts
from gyrocompass.recipe.report_scores import ScoreRow, SliceGroup, score_groups
from gyrocompass.recipe.report_training import Training, best_of_gap, trainings

if TYPE_CHECKING:
    from jinja2 import Template
    from markupsafe import Markup

REPORT = "report.html"
_SHOWN_LINES = 6
"""Lines of a completion on the terminal."""


# --- the terminal ---


def print_report(record: RunRecord, store: Store, console: Console) -> None:
    """Print the table of scores, the completions in short, and what the guard stopped."""
    groups = score_groups(record, store)
    if groups:
        print_fitting(partial(_score_table, groups), console)
    for changed in changes(record, store):
        _print_changed(changed, console)
    for group in completion_groups(record, store):
        _print_completions(group, console)
    for training in trainings(record, store):
        _print_forced(training, console)
        _print_watch(training, console)
        _print_incidents(training, console)


def _score_table(groups: Sequence[SliceGroup], measures: Sequence[Measure]) -> Table:
    table = plain_table("held-out scores", measures, ("docs", "groups", "tokens"))
    for group in groups:
        counts = group.counts
        name = Text(group.slice, style="bold")
        table.add_row(name, *[""] * len(measures), *(map(fmt.count, counts[:3]) if counts else [""] * 3))
        for row in group.rows:
            cells = [with_interval(row.score, measure) for measure in measures]
            table.add_row(Text(f"  {row.model}"), *cells, *([""] * 3 if counts else _own_counts(row)))
    return table


def _own_counts(row: ScoreRow) -> list[str]:
    return [fmt.count(getattr(row.score, name, None)) for name in ("documents", "groups", "tokens")]


def _print_changed(changed: Changed, console: Console) -> None:
    """What a stage changed: each measure on one line where the console is wide enough, else on two."""
    table = _changed_table(changed, on_one_line=True)
    if console.measure(table, options=console.options.update(width=10_000)).maximum > console.width:
        table = _changed_table(changed, on_one_line=False)
    console.print()
    console.print(table)
    if changed.summary:
        console.print(Text(changed.summary), soft_wrap=True)
    for name, reason in changed.left_out.items():
        console.print(Text(f"{name} was left out: {reason}", style="dim"), soft_wrap=True)


def _changed_table(changed: Changed, *, on_one_line: bool) -> Table:
    begun = f", which began as {changed.base}" if changed.base else ""
    table = Table(title=f"{changed.model}{begun}", title_style="bold", title_justify="left", box=None)
    table.padding, table.pad_edge = (0, 2, 0, 0), False
    table.add_column("measure", overflow="fold")
    table.add_column("now [95% interval]", no_wrap=True)
    if on_one_line:
        for heading in ("change, paired", "shows", "over", "groups"):
            table.add_column(heading, no_wrap=True)
    for line in changed.lines:
        now, change = _with_interval(line.after), _change(line)
        if on_one_line:
            over = f"{fmt.count(line.size)} {line.counted}"
            table.add_row(Text(line.measure), now, change, line.verdict, over, fmt.count(line.groups))
        else:
            table.add_row(Text(line.measure), now)
            if line.verdict or line.change:
                table.add_row(Text(f"  {line.verdict}"), change)
    return table


def _with_interval(one: Estimate) -> str:
    return f"{fmt.figure(one.value)} {fmt.interval(one.low, one.high)}"


def _change(line: Line) -> str:
    if line.change is None:
        return ""
    return f"{fmt.signed(line.change.value)} {fmt.interval(line.change.low, line.change.high)}"


def _print_completions(group: CompletionGroup, console: Console) -> None:
    console.print(Text(f"\n{group.stage} by {group.model}", style="bold"))
    for completion in group.completions:
        console.print(Text(f"> {_first_lines(completion.prompt, 1)}", style="cyan"), soft_wrap=True)
        console.print(Text(_first_lines(completion.text, _SHOWN_LINES)), soft_wrap=True)
        tokens = f"{fmt.figure(completion.nats_per_token)} nats/token over {len(completion.pieces)} tokens"
        console.print(Text(tokens, style="dim"))


def _first_lines(text: str, number: int) -> str:
    lines = text.strip("\n").splitlines()
    return "\n".join(lines[:number]) + (" ..." if len(lines) > number else "")


def _print_forced(training: Training, console: Console) -> None:
    for row in training.teacher_forced():
        text = f"{training.stage}, {row.slice}: {fmt.figure(row.last_nats)} nats/token under gold inputs"
        text += (
            f" in the last tenth of the steps, {fmt.figure(row.own_nats)} under its own (scheduled sampling)"
        )
        console.print(Text(text), soft_wrap=True)


def _print_watch(training: Training, console: Console) -> None:
    if not training.looks:
        return
    console.print(Text(f"\n{training.stage}, watched for gamed rewards", style="bold"))
    for look in training.looks:
        proxy, gold = (_with_interval(Estimate(**look[name])) for name in ("proxy", "gold"))
        text = f"step {look['step']}: reward {proxy}, gold {gold}, KL {fmt.figure(look['kl_nats'])} nats"
        console.print(Text(text), soft_wrap=True)
    console.print(Text(training.watched, style="dim"), soft_wrap=True)


def _print_incidents(training: Training, console: Console) -> None:
    for incident in training.incidents:
        where = f"step {incident['step']}, data window {incident['window']}"
        line = f"\n{training.stage}: {incident['verdict']} at {where}; action: {incident['action']}"
        console.print(Text(line, style="bold red"), soft_wrap=True)
        for document in incident["documents"]:
            console.print(
                Text(
                    f"  {document['document_id']} ({document['slice']}): {fmt.figure(document['nats'])} "
                    f"nats/token over {fmt.count(document['tokens'])} tokens"
                ),
                soft_wrap=True,
            )


# --- the page ---


class Headline(NamedTuple):
    """One of the figures at the top."""

    label: str
    value: str
    interval: str
    note: str


class StageFacts(NamedTuple):
    """A stage of the run and the artifact that stands for it."""

    stage: StageRecord
    artifact: Artifact


def write_report(record: RunRecord, store: Store, folder: Path) -> Path:
    """Write the run's report into `folder` and return its path."""
    # Matplotlib and Jinja take a while to import, and only this function needs them.
    from gyrocompass.recipe.report_plots import loss_plot, score_plot, shade, weight_plot
    from gyrocompass.recipe.svg import COLOURS, MARKERS

    groups, trained = score_groups(record, store), trainings(record, store)
    slices = sorted({name for training in trained for name in training.slices})
    stages = [StageFacts(stage, store.open(stage.artifact, verify=False)) for stage in record.stages]
    last_model = next((facts for facts in reversed(stages) if facts.artifact.manifest.kind == "model"), None)
    page = _template().render(
        record=record,
        headlines=_headlines(record, stages, groups, trained),
        groups=groups,
        score_plot=score_plot(groups) if groups else "",
        models=[row.model for row in groups[0].rows] if groups else [],
        trainings=[(training, loss_plot(training, slices), weight_plot(training)) for training in trained],
        slices=slices,
        colours=COLOURS,
        shapes=list(MARKERS.values()),
        shade=shade,
        data=data_facts(record, store),
        completions=completion_groups(record, store),
        changes=changes(record, store),
        side_by_side=side_by_side(record, store),
        paths=_incident_paths(trained, record, store),
        stages=stages,
        names={facts.artifact.id: facts.stage.name for facts in stages},
        last_model=last_model,
        lineage=walk(store, last_model.artifact.id).artifact if last_model else None,
    )
    path = folder / REPORT
    write_whole(path, page)
    return path


def _headlines(
    record: RunRecord, stages: Sequence[StageFacts], groups: Sequence[SliceGroup], trained: Sequence[Training]
) -> list[Headline]:
    figures: list[Headline] = []
    scored = [row for row in groups[-1].rows if row.score] if groups else []
    if scored:
        figures += [_score_headline(measure, scored[0], scored[-1]) for measure in MEASURES]
    if trained:
        tokens = sum(training.ledger.total.count for training in trained)
        steps = fmt.count(sum(len(training.steps) for training in trained))
        incidents = sum(len(training.incidents) for training in trained)
        figures.append(Headline("tokens learned from", fmt.brief(tokens), "", f"in {steps} steps"))
        figures.append(Headline("steps stopped by the guard", fmt.count(incidents), "", f"of {steps} steps"))
    for facts in stages:
        if "parameters" in facts.artifact.manifest.counts:
            parameters = facts.artifact.manifest.counts["parameters"]
            figures.append(Headline("parameters", fmt.brief(parameters), "", f"in {facts.stage.name}"))
    reused = sum(stage.reused for stage in record.stages)
    note = f"{reused} of {len(record.stages)} stages reused"
    figures.append(Headline("this run took", fmt.seconds(record.seconds), "", note))
    return figures


def _score_headline(measure: Measure, first: ScoreRow, last: ScoreRow) -> Headline:
    """A measure of the last model over all held-out tokens, and what it was at first."""
    value, low, high = estimate(last.score, measure.field)
    note = f"in {last.model}"
    if first is not last:
        note += f", from {fmt.figure(estimate(first.score, measure.field)[0])} in {first.model}"
    interval = "" if value is None else fmt.interval(low, high)
    return Headline(f"held-out {measure.heading}", fmt.figure(value), interval, note)


def _incident_paths(trained: Sequence[Training], record: RunRecord, store: Store) -> dict[str, str]:
    """The paths of the documents that incidents name, from the listing of the data they were trained on."""
    artifacts = {stage.name: stage.artifact for stage in record.stages}
    paths: dict[str, str] = {}
    for training in trained:
        named = {
            document["document_id"] for incident in training.incidents for document in incident["documents"]
        }
        if named:
            for read in (training.inputs[role] for role in ("data", "prompts") if role in training.inputs):
                listing = store.documents(artifacts[read])
                paths |= {row.document_id: row.path for row in listing if row.document_id in named}
    return paths


def _template() -> Template:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("gyrocompass.recipe", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    names = ("figure", "interval", "signed", "small", "count", "counted", "brief", "share", "seconds", "when")
    environment.filters |= {name: getattr(fmt, name) for name in names}
    environment.filters |= {"visible": _visible, "gap": best_of_gap}
    environment.globals |= {"estimate": estimate, "SCALE": fmt.SCALE, "DASH": fmt.DASH}
    return environment.get_template("report.html.j2")


def _visible(text: str) -> Markup:
    """A token's text, escaped, with a sign where it breaks the line."""
    from markupsafe import Markup, escape

    return escape(text).replace(
        "\n", Markup('<span class="newline">\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}</span>\n')
    )
