"""Cost against the number of tokens and against the vocabulary: lines on paper with both axes logarithmic.

At each size the contenders take turns for some rounds; a time is the minimum over rounds. A cost c ~ n^k is a
straight line whose slope k is fitted by least squares over all sizes; 1 is linear, 0 is constant.

Left out: the width D, in which everybody's cost is that of a matrix product.

Shape legend: T tokens, D hidden width, V vocabulary.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from loss_contenders import Head, ours, peers
from loss_tables import MIB
from loss_worker import Worker
from rich.console import Console

PLOT = "loss_scaling.svg"
_COLOURS = ("#0b6e4f", "#3a86c8", "#c1440e")


class Sweep(NamedTuple):
    """The sizes gone through: T at a fixed V, V at a fixed T."""

    tokens: tuple[int, ...] = (512, 1024, 2048, 4096, 8192)
    fixed_vocabulary: int = 16384
    vocabularies: tuple[int, ...] = (8192, 16384, 32768, 65536, 131072)
    fixed_tokens: int = 1024
    width: int = 256
    rounds: int = 3

    def heads(self) -> dict[str, list[tuple[int, Head]]]:
        """By axis: sizes and heads."""
        by_tokens = [(n, Head("", n, self.width, self.fixed_vocabulary, "bfloat16")) for n in self.tokens]
        by_vocabulary = [
            (n, Head("", self.fixed_tokens, self.width, n, "bfloat16")) for n in self.vocabularies
        ]
        return {
            f"tokens T (V {self.fixed_vocabulary}, D {self.width})": by_tokens,
            f"vocabulary V (T {self.fixed_tokens}, D {self.width})": by_vocabulary,
        }


SMALL = Sweep((16, 32, 64), 256, (256, 512, 1024), 32, 16, 2)


class Line(NamedTuple):
    """One contender along one axis."""

    title: str
    sizes: list[int]
    seconds: list[float]
    extra_bytes: list[int]
    """Empty where memory cannot be measured."""


def exponent(sizes: list[int], costs: list[float]) -> float:
    """The k of cost ~ size^k; NaN where a cost is not above 0.

    >>> round(exponent([1, 2, 4], [3.0, 12.0, 48.0]), 6)
    2.0
    """
    if not costs or min(costs) <= 0:
        return math.nan
    return round(float(np.polyfit(np.log(sizes), np.log(costs), 1)[0]), 6) + 0.0  # and no -0


def sweep_axis(heads: list[tuple[int, Head]], rounds: int, threads: int) -> list[Line]:
    """Every contender over the sizes of one axis."""
    mine = list(ours(heads[0][1]).items())[:2]
    full = peers(heads[0][1])["full"]
    contenders = dict(mine) | {"full": full}
    lines = {name: Line(contender.title, [], [], []) for name, contender in contenders.items()}
    with ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(name, threads)) for name in contenders}
        for size, head in heads:
            for worker in workers.values():
                worker.prepare(head)
            for worker in workers.values():
                worker.ready()
            firsts = {name: worker.first() for name, worker in workers.items()}
            again = [{name: sum(worker.again()) for name, worker in workers.items()} for _ in range(rounds)]
            for name, line in lines.items():
                line.sizes.append(size)
                line.seconds.append(min(one[name] for one in again))
                extra = firsts[name].extra_bytes
                if extra is not None:
                    line.extra_bytes.append(max(extra, 0))
    return list(lines.values())


def scaling(sweep: Sweep, threads: int, console: Console, folder: Path) -> str:
    """Measure both axes, print the fits, draw the plot into a folder; returns the Markdown."""
    found = {}
    for axis, heads in sweep.heads().items():
        console.log(f"cost against {axis}")
        found[axis] = sweep_axis(heads, sweep.rounds, threads)
    rows = [_row(axis, line) for axis, lines in found.items() for line in lines]
    for row in rows:
        console.print(": ".join(row[:2]), *row[2:], sep="; ", markup=False)
    folder.mkdir(parents=True, exist_ok=True)
    draw(found, folder / PLOT)
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return (
        "## Cost against size, bf16\n\n"
        f"![Time and memory against T and V, axes logarithmic]({PLOT})\n\n"
        "| against | | time | memory beyond inputs and gradients |\n|---|---|---|---|\n"
        f"{table}\n"
    )


def _row(axis: str, line: Line) -> list[str]:
    """A fit in words: exponents, and the largest values."""
    seconds, size = line.seconds[-1], axis.split()[1]
    time = f"~ {size}^{exponent(line.sizes, line.seconds):.2f}, {1000 * seconds:.1f} ms at {line.sizes[-1]}"
    if not line.extra_bytes:
        return [axis, line.title, time, ""]
    least, most = (bound(line.extra_bytes) / MIB for bound in (min, max))
    power = exponent(line.sizes, [float(value) for value in line.extra_bytes])
    return [axis, line.title, time, f"~ {size}^{power:.2f}, {least:.0f} to {most:.0f} MiB"]


def draw(found: dict[str, list[Line]], path: Path) -> None:
    """Four panels: time above, memory below, one column for each axis; a dotted line is linear."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    settings = {"svg.fonttype": "none", "svg.hashsalt": "gyrocompass", "font.size": 9}
    with mpl.rc_context(settings):
        figure, panels = pyplot.subplots(2, 2, figsize=(9, 6), sharex="col", sharey="row")
        for column, (axis, lines) in enumerate(found.items()):
            for line, colour in zip(lines, _COLOURS, strict=False):
                style = {"marker": "o", "markersize": 4, "color": colour, "label": line.title}
                panels[0, column].plot(line.sizes, [1000 * value for value in line.seconds], **style)
                if line.extra_bytes:
                    mebibytes = [max(value, MIB) / MIB for value in line.extra_bytes]
                    panels[1, column].plot(line.sizes, mebibytes, **style)
            _add_linear(panels[0, column], lines[0])
            for panel in panels[:, column]:
                _set_axes(panel, lines[0].sizes)
            panels[1, column].set_xlabel(axis)
        panels[0, 0].set_ylabel("ms, forward and backward")
        panels[1, 0].set_ylabel("MiB beyond inputs and gradients")
        handles, titles = panels[0, 0].get_legend_handles_labels()
        figure.legend(handles, titles, loc="upper center", ncols=4, frameon=False)
        figure.tight_layout(rect=(0, 0, 1, 0.95))
        figure.savefig(path, format="svg", metadata={"Date": None})
        pyplot.close(figure)


def _add_linear(panel: Any, line: Line) -> None:
    """Cost in proportion to size, from half of a line's first point."""
    start = 500 * line.seconds[0]
    costs = [start * size / line.sizes[0] for size in line.sizes]
    panel.plot(line.sizes, costs, color="0.5", linestyle=":", label="linear")


def _set_axes(panel: Any, sizes: list[int]) -> None:
    """Logarithmic both, with numbers that people write."""
    from matplotlib.ticker import FixedLocator, LogLocator, NullLocator, ScalarFormatter

    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.grid(alpha=0.3)
    panel.xaxis.set_major_locator(FixedLocator(sizes))
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(ScalarFormatter())
