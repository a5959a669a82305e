"""Scores as tables for the terminal: every measure in one table where it fits, else a table for each.

Names come from the data, so they are printed as they are (rich `Text`), never read as markup. A name that is
too long for its column is folded; nothing is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gyrocompass.measure.figures import DASH, figure, interval
from gyrocompass.measure.intervals import SliceScore


class Measure(NamedTuple):
    """A figure of a slice that has an interval."""

    heading: str
    field: str
    """Of `SliceScore`; the ends of the interval are `field` + "_low" and "_high"."""


MEASURES = (
    Measure("nats/token", "nats_per_token"),
    Measure("bits/byte", "bits_per_byte"),
    Measure("perplexity", "perplexity"),
)

NOTE = "[95% interval over groups: a file with all that was derived from it]"


def print_scores(rows: Sequence[SliceScore], console: Console, title: str) -> None:
    """Print a line per slice, figures with their intervals in brackets; a dash where there is none."""
    console.print(Text(title, style="bold"))
    print_fitting(lambda measures: _table(rows, measures), console)


def print_fitting(table_of: Callable[[Sequence[Measure]], Table], console: Console) -> None:
    """Print the table of all measures where the console is wide enough, else one for each; then a note."""
    together = table_of(MEASURES)
    unlimited = console.options.update(width=10_000)
    fits = console.measure(together, options=unlimited).maximum <= console.width
    for table in [together] if fits else [table_of([measure]) for measure in MEASURES]:
        console.print()
        console.print(table)
    console.print(Text(NOTE, style="dim"))


def plain_table(first: str, measures: Sequence[Measure], counts: Sequence[str]) -> Table:
    """A table without lines: a column of names, one per measure, and the counts at the right."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(first, overflow="fold")
    for measure in measures:
        table.add_column(measure.heading, no_wrap=True)
    for heading in counts:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def estimate(score: SliceScore | None, field: str) -> tuple[float | None, float | None, float | None]:
    """A measure of a score with its interval; None for what is not there."""
    value, low, high = (getattr(score, field + end, None) for end in ("", "_low", "_high"))
    return value, low, high


def with_interval(score: SliceScore | None, measure: Measure) -> Text:
    """A figure and its interval as a cell; a dash where it was not measured."""
    value, low, high = estimate(score, measure.field)
    return Text(figure(value) if value is None else f"{figure(value)} {interval(low, high)}")


def _table(rows: Sequence[SliceScore], measures: Sequence[Measure]) -> Table:
    table = plain_table("slice", measures, ("top-1", "docs", "groups", "tokens"))
    for row in rows:
        cells = [with_interval(row, measure) for measure in measures]
        top1 = DASH if row.top1 is None else f"{row.top1:.1%}"
        table.add_row(
            Text(row.slice), *cells, top1, f"{row.documents:,}", f"{row.groups:,}", f"{row.tokens:,}"
        )
    return table
