"""One table, twice: on the terminal and as Markdown; and a line about the machine it was measured on.

Shape legend: none; there are no tensors here.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import statistics
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch
from loss_errors import Errors
from rich.table import Table

MIB = 2**20
COLUMNS = ("", "runs", "ms, min", "median", "/ floor, min", "median", "extra MiB", "nll", "dh", "dw")


class Result(NamedTuple):
    """What was found about one contender."""

    title: str
    seconds: list[float]
    """Every repetition's; empty if it did not take part."""
    extra_bytes: int | None = None
    errors: Errors | None = None
    absent: str = ""
    """Why it did not take part."""
    holds_logits: bool = False
    kept_bytes: int | None = None
    """What a backend keeps of memory after the repetition."""

    @property
    def fastest(self) -> float:
        """Seconds."""
        return min(self.seconds)

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    def over(self, other: Result) -> tuple[float, float]:
        """How many times as long as another: by the minima, by the medians."""
        return self.fastest / other.fastest, self.median / other.median


def cells(result: Result, floor: Result) -> list[str]:
    """A row, as text."""
    if not result.seconds:
        return [result.title, result.absent, *[""] * (len(COLUMNS) - 2)]
    extra = "" if result.extra_bytes is None else f"{result.extra_bytes / MIB:.0f}"
    return [
        result.title + (" [T, V]" if result.holds_logits else ""),
        str(len(result.seconds)),
        *(f"{1000 * seconds:.1f}" for seconds in (result.fastest, result.median)),
        *(f"{ratio:.2f}" for ratio in result.over(floor)),
        extra,
        *(["", "", ""] if result.errors is None else [f"{error:.1e}" for error in result.errors]),
    ]


def terminal(title: str, rows: Sequence[Sequence[str]], lines: Sequence[str]) -> Table:
    """For people at a terminal."""
    table = Table(title=title, title_justify="left", caption="\n".join(lines), caption_justify="left")
    for index, column in enumerate(COLUMNS):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(cell.replace("[", r"\[") for cell in row))
    return table


def markdown(title: str, rows: Sequence[Sequence[str]], lines: Sequence[str]) -> str:
    """For the repository."""
    header = [list(COLUMNS), ["---", *["---:"] * (len(COLUMNS) - 1)], *rows]
    table = "\n".join("| " + " | ".join(row) + " |" for row in header)
    return f"## {title}\n\n{table}\n\n" + "\n".join(f"- {line}" for line in lines) + "\n"


def machine(device: str = "cpu") -> str:
    """What it runs on, now."""
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    versions = f"torch {torch.__version__}, Python {platform.python_version()}{_peers()}"
    if device == "cuda":
        return f"{today}: {torch.cuda.get_device_name()}, {versions}"
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, load {load}"
    return f"{today}: {_processor()}, {threads}, {versions}"


def _peers() -> str:
    """Those that are installed of the packages measured beside us, and what they run on."""
    found = []
    for package in ("trl", "triton", "liger-kernel", "cut-cross-entropy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append(f", {package} {metadata.version(package)}")
    return "".join(found)


def _processor() -> str:
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].split(":")[1].strip() if lines else name
    return f"{name} {'with' if torch.cpu._is_amx_tile_supported() else 'without'} AMX"
