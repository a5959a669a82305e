"""The report of a data set: one HTML file that needs nothing but itself, and the same in short on a terminal.

    data set --write_data_report--> HTML: funnel, slices, lengths, surprisal, duplicates, findings, samples
    data set --print_inspection--> tables and samples

All text of the data (paths, slices, samples) is escaped; there is no script and no request. What is personal
or secret is shown by its kind alone unless it is asked for.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gyrocompass.core.folder import write_whole
from gyrocompass.data.curate.card import DataCard, Parts
from gyrocompass.data.curate.inspection import Inspection, Sample
from gyrocompass.data.curate.show import funnel, print_build
from gyrocompass.recipe import report_format as fmt

if TYPE_CHECKING:
    from jinja2 import Template

_STYLES = {"personal": "black on yellow", "secrets": "white on red", "contamination": "black on magenta"}
_OTHER_STYLE = "black on cyan"


def print_inspection(parts: Parts, card: DataCard, seen: Inspection, console: Console) -> None:
    """Print the funnel, what stays, what was found, and the samples."""
    print_build(parts.dataset, parts.corpus_artifact, console)
    if card.findings:
        console.print(_findings_table(card))
    if card.lost:
        console.print(_lost_table(card))
    for sample in seen.samples:
        _print_sample(sample, console)


def _findings_table(card: DataCard) -> Table:
    table = Table(title="spans that steps found", title_style="bold")
    for head in ("step", "kind"):
        table.add_column(head, overflow="fold")
    for head in ("documents", "spans", "in kept documents", "of these covered"):
        table.add_column(head, justify="right")
    for each in card.findings:
        numbers = (each.documents, each.spans, each.kept_spans, each.covered_spans)
        table.add_row(Text(each.step), Text(each.kind), *map(fmt.count, numbers))
    return table


def _lost_table(card: DataCard) -> Table:
    table = Table(title=f"could not be read: {card.lost_share:.2%} of all records", title_style="bold")
    table.add_column("reason", overflow="fold")
    table.add_column("records", justify="right")
    table.add_column("the first", overflow="fold")
    for each in card.lost:
        table.add_row(Text(each.reason), fmt.count(each.records), Text(each.example))
    return table


def _print_sample(sample: Sample, console: Console) -> None:
    said = filter(None, (sample.slice, sample.licence, sample.language, f"{sample.n_bytes:,} bytes"))
    console.print(Text(f"\n{sample.path}", style="bold"), soft_wrap=True)
    console.print(Text(f"{sample.id}  {', '.join(said)}  {sample.verdict}", style="dim"), soft_wrap=True)
    text = Text()
    for piece in sample.pieces:
        text.append(piece.text, style=_STYLES.get(piece.topic, _OTHER_STYLE) if piece.kinds else "")
    if sample.is_cut:
        text.append(" ...", style="dim")
    console.print(text, soft_wrap=True)


def write_data_report(parts: Parts, card: DataCard, seen: Inspection, path: Path) -> Path:
    """Write the report to `path` and return it."""
    # Matplotlib and Jinja take a while to import, and only this function needs them.
    from gyrocompass.recipe.data_report_plots import (
        counted_plot,
        funnel_plot,
        histogram_plot,
        shown_slices,
    )

    lines = funnel(parts.dataset, parts.corpus_artifact)
    surprisals = [
        (each, histogram_plot(each, each.name, logarithmic=False), shown_slices(each))
        for each in seen.surprisals
        if each.by_slice
    ]
    page = _template().render(
        card=card,
        seen=seen,
        funnel=lines,
        funnel_plot=funnel_plot(lines),
        groups=[(name, rows, counted_plot(name, rows)) for name, rows in card.by.items()],
        length_plot=histogram_plot(seen.lengths, "bytes of UTF-8", logarithmic=True),
        length_slices=shown_slices(seen.lengths),
        surprisals=surprisals,
        dropped=sum(each.documents for each in card.dropped),
        covered=int(parts.dataset.manifest.counts["covered"]),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, page)
    return path


def _template() -> Template:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("gyrocompass.recipe", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        name: getattr(fmt, name) for name in ("count", "counted", "brief", "share", "when")
    }
    environment.globals |= {"DASH": fmt.DASH}
    return environment.get_template("data_report.html.j2")
