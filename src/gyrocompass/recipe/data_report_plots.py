"""The plots of a data set's report, drawn as `gyrocompass.recipe.svg` says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gyrocompass.data.curate.card import Counted
from gyrocompass.data.curate.inspection import Histogram
from gyrocompass.data.curate.show import FunnelLine
from gyrocompass.recipe.svg import COLOURS, DASHES, both, mark, series, style

MOST_BARS = 14
"""Of the largest; the rest is one bar."""
MOST_SLICES = 6
BINS = 40
_BAR_HEIGHT = 26


def funnel_plot(lines: Sequence[FunnelLine]) -> str:
    """Documents that are left after each step, and what the step took."""
    steps = [line for line in lines if line.left is not None]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for place, line in enumerate(steps):
            left = line.left or 0
            axes.barh(place, left, height=0.62, color=mark("series-0"))
            if line.what.startswith("dropped"):
                axes.barh(place, line.documents, left=left, height=0.62, color=mark("series-1"))
            _write(
                axes, f"{left:,}", left + (line.documents if line.what.startswith("dropped") else 0), place
            )
        _rows(axes, [line.what for line in steps], max(line.left or 0 for line in steps))
        axes.set_xlabel("documents", color=mark("muted"))

    return both("funnel", "Documents left after each step", 50 + _BAR_HEIGHT * len(steps), draw)


def counted_plot(name: str, rows: Sequence[Counted]) -> str:
    """Bytes of each slice, language or licence."""
    shown = list(rows[:MOST_BARS])
    rest = rows[MOST_BARS:]
    if rest:
        shown.append(
            Counted(f"{len(rest)} others", sum(r.documents for r in rest), sum(r.bytes for r in rest), None)
        )

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for place, row in enumerate(shown):
            axes.barh(place, row.bytes / 1e6, height=0.62, color=mark("series-0"))
            _write(axes, f"{row.bytes / 1e6:,.2f}", row.bytes / 1e6, place)
        _rows(axes, [row.name for row in shown], max((row.bytes / 1e6 for row in shown), default=1.0))
        axes.set_xlabel("MB of UTF-8", color=mark("muted"))

    return both(f"counted-{name}", f"Bytes by {name}", 50 + _BAR_HEIGHT * max(len(shown), 1), draw)


def histogram_plot(histogram: Histogram, label: str, *, logarithmic: bool) -> str:
    """How a figure is spread in each of the largest slices, as a share of the slice's documents."""
    slices = shown_slices(histogram)

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        edges = _edges([histogram.by_slice[name] for name in slices], logarithmic)
        for index, name in enumerate(slices):
            counts, _ = np.histogram(histogram.by_slice[name], edges)
            axes.stairs(
                100 * counts / max(counts.sum(), 1),
                edges,
                color=mark(series(index)),
                linewidth=1.6,
                linestyle=DASHES[index // COLOURS % len(DASHES)],
            )
        if logarithmic:
            axes.set_xscale("log")
            axes.minorticks_off()
            axes.xaxis.set_major_formatter(lambda value, place: f"{value:,.0f}")
        axes.set_ylim(bottom=0)
        style(axes, "y")
        axes.set_xlabel(label, color=mark("muted"))
        axes.set_ylabel("% of the slice's documents", color=mark("muted"))

    return both(f"histogram-{histogram.name}", f"{label} by slice", 300, draw) if slices else ""


def shown_slices(histogram: Histogram) -> list[str]:
    """The slices with the most documents, in the order of their names."""
    by_size = sorted(histogram.by_slice, key=lambda name: (-len(histogram.by_slice[name]), name))
    return sorted(by_size[:MOST_SLICES])


def _edges(figures: Sequence[Any], logarithmic: bool) -> Any:
    values = np.concatenate(figures)
    values = values[np.isfinite(values)]
    if logarithmic:
        values = np.maximum(values, 1)
        return np.geomspace(values.min(), max(values.max(), values.min() * 2), BINS + 1)
    low, high = np.percentile(values, [0, 99.5])
    return np.linspace(low, max(high, low + 1e-9), BINS + 1)


def _rows(axes: Any, names: Sequence[str], most: float) -> None:
    """The names of horizontal bars, the first at the top, with room for what is written behind them."""
    axes.set_yticks(range(len(names)), [name if len(name) < 44 else f"{name[:42]} ..." for name in names])
    for text in axes.get_yticklabels():
        text.set_parse_math(False)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, max(most, 1e-9) * 1.12)
    style(axes, "x")
    axes.tick_params(axis="y", labelcolor=mark("ink"))


def _write(axes: Any, text: str, x: float, y: float) -> None:
    axes.annotate(
        text, (x, y), xytext=(5, 0), textcoords="offset points", va="center", color=mark("muted"), fontsize=11
    )
