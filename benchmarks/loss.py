"""Time, peak memory and error of the loss over a language model's head, beside what others offer.

    python benchmarks/loss.py                    (or `make bench`; about 12 minutes on 2 cores)
    python benchmarks/loss.py --heads demo 135m  (2 of them)
    python benchmarks/loss.py --write            (into docs/benchmarks instead of build/benchmarks)

The tables and a plot of cost against size are written as loss.md and loss_scaling.svg; the path is printed.

One measurement is a forward and a backward pass: from hidden states, head weight and targets to gradients.
The floor is the bare matrix products of the same inputs: z = h w^T, dh = dz w and dw = dz^T h, and z a second
time for those who make logits twice.

The matrix units of a shared machine belong to whoever asks first, and a neighbour can make everything five
times slower for some seconds. So contenders take turns: one repetition of each is a round, and its order is
rotated from round to round. Ratios are of the minima over rounds, and of the medians; where both agree, both
are to be trusted. Who takes much longer than the rest runs in the first round alone; the slowest, with
fewer tokens, their time scaled up by the tokens (the tables say who).

"extra" is the peak of the process's memory beyond inputs and gradients (`loss_worker.py`). Who has "[T, V]"
by the name holds something of that size. Errors are against float64, on the first tokens: the largest of a
token's loss, in nats, and relative norms for the gradients.

Shape legend: T tokens, D hidden width, V vocabulary.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch
from loss_contenders import FLOOR, Contender, Head, floor_seconds, ours, peers, prefers_three
from loss_scaling import SMALL as SMALL_SCALING
from loss_scaling import Sweep, scaling
from loss_tables import MIB, Result, cells, machine, markdown, terminal
from loss_worker import First, Worker
from rich.console import Console

_ROOT = Path(__file__).parents[1]
DOCS, BUILD = _ROOT / "docs" / "benchmarks", _ROOT / "build" / "benchmarks"


class Plan(NamedTuple):
    """How one head is measured."""

    head: Head
    rounds: int
    once_s: float
    """Who takes longer in the first round is in no other."""
    error_tokens: int
    fewer_tokens: dict[str, int]
    """Who is measured with fewer tokens."""


PLANS = {
    "demo": Plan(Head("The demo's head, float32", 4096, 256, 8192, "float32"), 8, 5.0, 256, {}),
    "135m": Plan(
        Head("A 135M model's head, bf16", 2048, 576, 49152, "bfloat16"), 6, 5.0, 128, {"torch": 1024}
    ),
    "large": Plan(
        Head("A large head, bf16", 4096, 2048, 128256, "bfloat16"),
        3,
        24.0,
        64,
        {"torch": 512, "trl": 1024, "full32": 1024, "chunked/separable": 1024},
    ),
}
SMALL = {
    "demo": Plan(Head("Small, float32", 64, 32, 512, "float32"), 2, 5.0, 32, {}),
    "135m": Plan(Head("Small, bf16", 64, 32, 512, "bfloat16"), 2, 5.0, 32, {"torch": 32}),
}


class Measured(NamedTuple):
    """One contender over the rounds."""

    contender: Contender
    n_tokens: int
    laps: list[list[float]]
    first: First


def measure(plan: Plan, threads: int, console: Console) -> tuple[list[Result], Result, Result]:
    """Everybody's results, and the floors of three products and of four."""
    everybody = {FLOOR: Contender("the products alone", _no_loss, True)} | ours(plan.head) | peers(plan.head)
    absent = [
        Result(c.title, [], absent=why) for c in everybody.values() if (why := c.absent("cpu")) is not None
    ]
    present = {name: c for name, c in everybody.items() if c.absent("cpu") is None}
    with ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(name, threads)) for name in present}
        sizes = {name: plan.fewer_tokens.get(name, plan.head.n_tokens) for name in present}
        for name, worker in workers.items():
            worker.prepare(plan.head._replace(n_tokens=sizes[name]))
        for worker in workers.values():
            worker.ready()
        found = {}
        for name, worker in workers.items():
            console.log(f"{plan.head.title}: {present[name].title}")
            first = worker.first()
            found[name] = Measured(present[name], sizes[name], [first.laps], first)
        _more_rounds(plan, workers, found, console)
        results = [_result(plan, found[name], workers[name]) for name in found if name != FLOOR]
    three, four = ([floor_seconds(laps)[index] for laps in found[FLOOR].laps] for index in (0, 1))
    floors = (Result("floor: z, dh, dw", three), Result("floor: z, z, dh, dw", four))
    return [*results, *absent], *floors


def _more_rounds(
    plan: Plan, workers: dict[str, Worker], found: dict[str, Measured], console: Console
) -> None:
    """The rounds after the first, each beginning with another contender."""
    quick = [name for name, one in found.items() if sum(one.laps[0]) <= plan.once_s or name == FLOOR]
    for number in range(1, plan.rounds):
        console.log(f"{plan.head.title}: round {number + 1} of {plan.rounds}")
        start = number % len(quick)
        for name in quick[start:] + quick[:start]:
            found[name].laps.append(workers[name].again())


def _result(plan: Plan, measured: Measured, worker: Worker) -> Result:
    """Times scaled to all tokens, and errors."""
    scale = plan.head.n_tokens / measured.n_tokens
    note = f" (T {measured.n_tokens}, time x {scale:g})" if scale != 1 else ""
    return Result(
        title=measured.contender.title + note,
        seconds=[scale * sum(laps) for laps in measured.laps],
        extra_bytes=measured.first.extra_bytes,
        errors=worker.errors(plan.error_tokens),
        holds_logits=measured.contender.holds_logits,
        kept_bytes=measured.first.kept_bytes,
    )


def _no_loss(*_: torch.Tensor) -> torch.Tensor:
    raise AssertionError("the floor has no loss")


def verdicts(plan: Plan, results: list[Result], three: Result, four: Result) -> list[str]:
    """What the tables are made for: us against the floors and against the fastest who holds no [T, V]."""
    mine = [result for result in results if result.title.startswith("ours")]
    backend = mine[0].title.removeprefix("ours, ").split(":")[0]
    products = 3 if prefers_three(plan.head, backend) else 4
    lines = [f"separable makes {products} products here (the {backend} backend chose)"]
    by_floor = ((mine[0], three, "three products"), (mine[1], four, "four products"))
    for result, floor, name in by_floor:
        lines.append(f"{result.title}: {_both(result, floor)} times the {name} (wanted: at most 1.25)")
    flat = [r for r in results if r.seconds and not r.holds_logits and r not in mine]
    if flat:
        best = min(flat, key=lambda result: result.fastest)
        lines.append(
            f"the fastest peer without [T, V], {best.title}: {_both(best, mine[0])} times as long as ours,"
            f" separable; {_both(best, mine[1])} times as long as two-pass (wanted: at least 3)"
        )
    return [*lines, *(_memory(result) for result in mine if result.extra_bytes is not None)]


def _memory(result: Result) -> str:
    extra, kept = ((number or 0) / MIB for number in (result.extra_bytes, result.kept_bytes))
    return f"{result.title}: {extra:.0f} MiB beyond inputs and gradients (wanted: under 64), {kept:.0f} stay"


def _both(result: Result, other: Result) -> str:
    """A ratio by the minima and by the medians."""
    return "{:.2f} (medians {:.2f})".format(*result.over(other))


def report_head(plan: Plan, threads: int, console: Console) -> str:
    """Measure one head and print its table; returns the Markdown."""
    before = machine()
    results, three, four = measure(plan, threads, console)
    rows = [cells(result, three) for result in (three, four, *results)]
    lines = [*verdicts(plan, results, three, four), f"before: {before}", f"after: {machine()}"]
    title = f"{plan.head.title} ({plan.head.shape})"
    console.print(terminal(title, rows, lines))
    return markdown(title, rows, lines)


HEADER = """# The loss, measured

Written by `benchmarks/loss.py`, whose first lines say how to read it. Ratios are to the floor of
three products; wherever there are two, the first is of the minima over rounds, the second of the medians.
"""


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--heads", choices=PLANS, nargs="+", help="which heads (default: all)")
    parser.add_argument("--rounds", type=int, help="how many rounds for each head (default: its own number)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads")
    parser.add_argument("--no-scaling", action="store_true", help="leave the sweeps over T and V out")
    parser.add_argument("--small", action="store_true", help="tiny shapes: do all of this, measure nothing")
    parser.add_argument(
        "--write", type=Path, nargs="?", const=DOCS, metavar="FOLDER", help="where to (docs/benchmarks)"
    )
    options = parser.parse_args()
    if options.write and (options.heads or options.no_scaling):
        parser.error("--write takes all heads and the sweeps")
    folder: Path = options.write or BUILD
    torch.set_num_threads(options.threads)
    plans = SMALL if options.small else PLANS
    console = Console(width=max(150, Console().width), log_path=False)
    parts = [HEADER]
    for name in options.heads or plans:
        plan = plans[name]
        plan = plan._replace(rounds=options.rounds or plan.rounds)
        parts.append(report_head(plan, options.threads, console))
    if not options.no_scaling:
        sweep = SMALL_SCALING if options.small else Sweep()
        parts.append(scaling(sweep, options.threads, console, folder))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "loss.md").write_text("\n".join(parts), encoding="utf-8")
    console.print(f"written: {folder / 'loss.md'}", soft_wrap=True, markup=False)


if __name__ == "__main__":
    main()
