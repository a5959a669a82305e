"""Steps of supervised fine-tuning and DPO on SmolLM2-135M, beside TRL's trainers with the same settings.

    python benchmarks/align.py                          (or `make bench-align`)
    python benchmarks/align.py --model FOLDER --write   (a model at hand; also docs/benchmarks/align.md)
    python benchmarks/align.py --tasks sft --contenders ours trl --rounds 5

A step is 4 sequences of 512 tokens: four documents, or the sides of two pairs with prompts of 256. First the
losses of step 0 have to agree: to 1e-3 in float32; in bf16, whose rounding is of that size, to 2 parts in
1000 of the loss and of the NLL per token, and both are printed.

Contenders take turns, one step each, in another order every round (`align_worker.py`); the step that warms up
counts for memory alone. On a shared machine a step's CPU seconds, over all threads, say more than its
time. Ratios are TRL over ours: above 1, ours is faster, or smaller. A reference pass that
happens once, before the first step, is told apart; TRL's default makes one in every step.

Shape legend: none; there are no tensors here.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from align_contenders import CONTENDERS, Task
from align_models import prepare_model
from align_worker import Lap, Worker
from loss_tables import MIB, machine
from rich.console import Console
from rich.table import Table

DOCS = Path(__file__).parents[1] / "docs" / "benchmarks"
TOLERANCE = {"float32": (1e-3, 0.0), "bfloat16": (1e-3, 2e-3)}
"""Absolute and relative, of the losses of step 0."""
TITLES = {"sft": "Supervised fine-tuning", "dpo": "DPO"}
COLUMNS = (
    *("", "steps", "s, min", "median", "tok/s", "time / ours, min", "median", "CPU s, min", "/ ours"),
    *("peak MiB", "/ ours", "once, s"),
)
WANTED = "wanted: at least 1.8 times those of TRL without checkpointing, at most 0.75 of its memory"


class Measured(NamedTuple):
    """One contender over the rounds."""

    title: str
    first: Lap
    """The step that warms up: its loss, and memory."""
    laps: list[Lap]
    apart_s: float

    @property
    def seconds(self) -> list[float]:
        """Of every step that counts."""
        return [lap.seconds for lap in self.laps]

    @property
    def cpu_seconds(self) -> float:
        """Of all threads, the least of any step that counts."""
        return min(lap.cpu_seconds for lap in self.laps)

    @property
    def peak_bytes(self) -> int | None:
        """Of all steps."""
        return self.laps[-1].peak_bytes

    def over(self, other: Measured) -> tuple[float, float]:
        """How many times as long as another: by the minima, by the medians."""
        return (
            min(self.seconds) / min(other.seconds),
            statistics.median(self.seconds) / statistics.median(other.seconds),
        )


def measure(task: Task, names: list[str], rounds: int, threads: int, console: Console) -> dict[str, Measured]:
    """Everybody's steps, in turns."""
    with ExitStack() as stack:
        workers, found = {}, {}
        for name in names:
            console.log(f"{task.kind}: {CONTENDERS[name].title}: step 0")
            workers[name] = stack.enter_context(Worker(name, task, threads))
            apart_s = workers[name].ready()
            found[name] = Measured(CONTENDERS[name].title, workers[name].step(), [], apart_s)
        check_agreement(found, task.dtype, console)
        for number in range(rounds):
            console.log(f"{task.kind}: round {number + 1} of {rounds}")
            start = number % len(names)
            for name in names[start:] + names[:start]:
                found[name].laps.append(workers[name].step())
    return found


def check_agreement(found: dict[str, Measured], dtype: str, console: Console) -> None:
    """Everybody's step 0 has our loss.

    Raises:
        RuntimeError: it has not.
    """
    mine = next(iter(found.values())).first
    absolute, relative = TOLERANCE[dtype]
    for one in found.values():
        console.log(f"{one.title}: loss {one.first.loss:.5f}, {one.first.nll_nats:.5f} nats per token")
        for own, other in ((mine.loss, one.first.loss), (mine.nll_nats, one.first.nll_nats)):
            if abs(own - other) > absolute + relative * abs(own):
                raise RuntimeError(f"{one.title} has {other}, ours {own}: not the same loss")


def cells(one: Measured, mine: Measured, tokens: int) -> list[str]:
    """A row, as text."""
    peak = [""] * 2
    if one.peak_bytes is not None and mine.peak_bytes is not None:
        peak = [f"{one.peak_bytes / MIB:.0f}", f"{one.peak_bytes / mine.peak_bytes:.2f}"]
    return [
        one.title,
        str(len(one.laps)),
        f"{min(one.seconds):.2f}",
        f"{statistics.median(one.seconds):.2f}",
        f"{tokens / statistics.median(one.seconds):.0f}",
        *(f"{ratio:.2f}" for ratio in one.over(mine)),
        f"{one.cpu_seconds:.2f}",
        f"{one.cpu_seconds / mine.cpu_seconds:.2f}",
        *peak,
        f"{one.apart_s:.1f}" if one.apart_s else "",
    ]


def verdict(found: dict[str, Measured]) -> list[str]:
    """The figures that were promised, and the losses of step 0."""
    losses = "; ".join(
        f"{one.title} {one.first.loss:.5f} ({one.first.nll_nats:.5f})" for one in found.values()
    )
    lines = [f"loss of step 0 (nats per learned token): {losses}"]
    if "trl" in found:
        mine, theirs = found["ours"], found["trl"]
        fastest, median = theirs.over(mine)
        memory = (mine.peak_bytes or 0) / (theirs.peak_bytes or 1)
        cpu = theirs.cpu_seconds / mine.cpu_seconds
        speed = (
            f"{fastest:.2f} (medians {median:.2f}, by CPU seconds {cpu:.2f}) times TRL's tokens per second"
        )
        lines.append(f"ours: {speed}, {memory:.2f} of its memory ({WANTED})")
    return lines


def report(task: Task, found: dict[str, Measured], notes: list[str], console: Console) -> str:
    """Print the table; gives the Markdown."""
    rows = [cells(one, found["ours"], task.tokens) for one in found.values()]
    lines = [*verdict(found), *notes, f"after: {machine()}"]
    title = f"{TITLES[task.kind]}, {task.sequences} x {task.length} tokens, {task.dtype}"
    table = Table(title=title, title_justify="left", caption="\n".join(lines), caption_justify="left")
    for index, column in enumerate(COLUMNS):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    header = [list(COLUMNS), ["---", *["---:"] * (len(COLUMNS) - 1)], *rows]
    body = "\n".join("| " + " | ".join(row) + " |" for row in header)
    return f"## {title}\n\n{body}\n\n" + "\n".join(f"- {line}" for line in lines) + "\n"


HEADER = """# Steps of alignment, measured

Written by `benchmarks/align.py --write`, whose first lines say how to read it. `once, s` is what a reference
pass takes before the first step.
"""


def main() -> None:
    """Measure, print, and write if asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tasks", choices=TITLES, nargs="+", default=list(TITLES), help="which (default: both)"
    )
    parser.add_argument("--contenders", choices=CONTENDERS, nargs="+", help="ours and these (default: all)")
    parser.add_argument(
        "--model", type=Path, help="a folder with model and tokenizer (default: SmolLM2-135M)"
    )
    parser.add_argument("--dtype", choices=TOLERANCE, default="bfloat16", help="of the weights")
    parser.add_argument("--rounds", type=int, default=5, help="steps of each after the first")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads")
    parser.add_argument("--small", action="store_true", help="a tiny model: do all of this, measure nothing")
    parser.add_argument("--write", type=Path, nargs="?", const=DOCS, metavar="FOLDER", help="write align.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = Console(width=max(150, Console().width), log_path=False)
    with tempfile.TemporaryDirectory() as made:
        model = options.model or Path(made)
        what = options.model.name if options.model else prepare_model(model, small=options.small)
        parts = [HEADER]
        for kind in options.tasks:
            size = {"length": 16} if options.small else {}
            task = Task(kind, str(model), dtype=options.dtype, **size)
            names = ["ours", *(n for n in _taking_part(kind, options.contenders) if n != "ours")]
            notes = [f"model: {what}", f"before: {machine()}"]
            found = measure(task, names, options.rounds, options.threads, console)
            parts.append(report(task, found, notes, console))
    if options.write:
        options.write.mkdir(parents=True, exist_ok=True)
        (options.write / "align.md").write_text("\n".join(parts), encoding="utf-8")


def _taking_part(kind: str, asked: list[str] | None) -> list[str]:
    return [
        name
        for name, one in CONTENDERS.items()
        if kind in one.kinds and name in (asked or CONTENDERS) and (not one.package or find_spec(one.package))
    ]


if __name__ == "__main__":
    main()
