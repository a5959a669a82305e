"""The same on a GPU: time, peak memory and error of the loss over a large head, beside what others offer.

    python benchmarks/loss_gpu.py                        (a few minutes)
    python benchmarks/loss_gpu.py --write                (also docs/benchmarks/loss_gpu.md)
    python benchmarks/loss_gpu.py --device cpu --small   (every path that needs no GPU, on a tiny head)

Read the beginning of `loss.py` first: what is measured, the floor, the rounds and the columns are the same.
One process does for all, because the allocator tells the peak of each repetition, and its memory belongs
to nobody else. A first repetition, in which kernels are compiled and tuned, is not timed; its memory is not
taken either. Times are between two events on the GPU; the products of a floor follow each other between
two events, as a loss's do, because a GPU at its limit of power is faster for a product alone. The chunked
backend, which is for CPUs, is in the first round alone.

The peers that are packages: `pip install liger-kernel trl`, and cut-cross-entropy from its repository, as the
release is old. Who is not installed or does not run has a row that says so.

Shape legend: T tokens, D hidden width, V vocabulary.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from pathlib import Path

import torch
from loss_contenders import Contender, Head, floor_laps, gpu_peers, ours, prefers_three
from loss_errors import Errors, errors
from loss_tables import MIB, Result, cells, machine, markdown, terminal
from rich.console import Console

DOCS = Path(__file__).parents[1] / "docs" / "benchmarks"
HEAD = Head("A large head, bf16", 8192, 4096, 152064, "bfloat16")
SMALL = Head("Small, bf16", 64, 32, 512, "bfloat16")
ERROR_TOKENS = 256

Lap = Callable[[], object]


class Bench:
    """The inputs, and one repetition of anything on them."""

    def __init__(self, head: Head, device: str) -> None:
        self.head, self.device = head, device
        self.inputs = head.inputs(device)

    def repetition(self, laps: list[Lap]) -> list[float]:
        """Seconds of each lap, with no gradients before."""
        self.inputs[0].grad = self.inputs[1].grad = None
        return [self._seconds(lap) for lap in laps]

    def peak(self, laps: list[Lap]) -> int | None:
        """A repetition; its peak beyond inputs and gradients."""
        if self.device != "cuda":
            self.repetition(laps)
            return None
        self.inputs[0].grad = self.inputs[1].grad = None
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self.repetition(laps)
        return torch.cuda.max_memory_allocated() - before - self.head.gradient_bytes

    def laps(self, contender: Contender) -> list[Lap]:
        """Forward and backward."""
        return [lambda: contender.loss_T(*self.inputs).mean().backward()]

    def errors(self, contender: Contender) -> Errors:
        """On the first tokens."""
        h_TD, w_VD, target_T = self.inputs
        return errors(contender.loss_T, h_TD[:ERROR_TOKENS].clone(), w_VD, target_T[:ERROR_TOKENS].clone())

    def _seconds(self, lap: Lap) -> float:
        if self.device != "cuda":
            start = time.perf_counter()
            lap()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        lap()
        end.record()
        torch.cuda.synchronize()
        milliseconds: float = begin.elapsed_time(end)
        return milliseconds / 1000


def measure(bench: Bench, rounds: int, console: Console) -> tuple[list[Result], Result, Result]:
    """Everybody's results, and the floors of three products and of four."""
    everybody = ours(bench.head, bench.device) | gpu_peers(bench.head, bench.device)
    absent = {name: why for name, c in everybody.items() if (why := c.absent(bench.device)) is not None}
    extra: dict[str, int | None] = {}
    found: dict[str, Errors] = {}
    for name in [name for name in everybody if name not in absent]:
        console.log(everybody[name].title)
        try:
            bench.repetition(bench.laps(everybody[name]))
            extra[name] = bench.peak(bench.laps(everybody[name]))
            found[name] = bench.errors(everybody[name])
        # A peer may fail in as many ways as there are peers: its row says how, and the others go on.
        except Exception as error:
            absent[name] = f"{type(error).__name__}: {str(error).splitlines()[0]:.60}"
        _free(bench)
    laps = {name: bench.laps(everybody[name]) for name in everybody if name in found}
    times, floor = _rounds(bench, laps, rounds, console)
    results = [
        Result(
            contender.title,
            times.get(name, []),
            extra.get(name),
            found.get(name),
            absent.get(name, ""),
            contender.holds_logits,
        )
        for name, contender in everybody.items()
    ]
    three, four = ([seconds[index] for seconds in floor] for index in (0, 1))
    return results, Result("floor: z, dh, dw", three), Result("floor: z, z, dh, dw", four)


def _rounds(
    bench: Bench, laps: dict[str, list[Lap]], rounds: int, console: Console
) -> tuple[dict[str, list[float]], list[list[float]]]:
    """Seconds of everybody, and of three products and of four, taking turns.

    The floor's outputs live all along.
    """
    products = floor_laps(bench.inputs)()
    three, four = (lambda: _each(products[:3])), (lambda: _each(products))
    bench.repetition([three, four])
    times: dict[str, list[float]] = {name: [] for name in laps}
    floor = []
    for number in range(rounds):
        console.log(f"round {number + 1} of {rounds}")
        floor.append(bench.repetition([three, four]))
        names = [name for name in laps if number == 0 or not name.startswith("chunked")]
        start = number % max(1, len(names))
        for name in names[start:] + names[:start]:
            times[name] += bench.repetition(laps[name])
    return times, floor


def _each(laps: list[Lap]) -> None:
    for lap in laps:
        lap()


def _free(bench: Bench) -> None:
    bench.inputs[0].grad = bench.inputs[1].grad = None
    gc.collect()
    if bench.device == "cuda":
        torch.cuda.empty_cache()


def verdicts(bench: Bench, results: list[Result], three: Result, four: Result) -> list[str]:
    """Us against the floors, the memory wanted, and the fastest peer."""
    mine = [result for result in results if result.title.startswith("ours") and result.seconds]
    others = [result for result in results if result.seconds and result not in mine]
    backend = mine[0].title.removeprefix("ours, ").split(":")[0]
    products = 3 if prefers_three(bench.head, backend, bench.device) else 4
    lines = [f"separable makes {products} products here (the {backend} backend chose)"]
    for result, floor, name in ((mine[0], three, "three"), (mine[1], four, "four")):
        extra = "" if result.extra_bytes is None else f"; {result.extra_bytes / MIB:.0f} MiB extra"
        ratio = "{:.2f} (medians {:.2f})".format(*result.over(floor))
        lines.append(f"{result.title}: {ratio} times the {name} products (wanted: at most 1.15){extra}")
    if others:
        best = min(others, key=lambda result: result.fastest)
        ratios = ["{:.2f} (medians {:.2f})".format(*best.over(result)) for result in mine[:2]]
        lines.append(
            f"the fastest peer, {best.title}: {ratios[0]} times as long as ours, separable;"
            f" {ratios[1]} as two-pass"
        )
    return lines


def main() -> None:
    """Measure, print, and write if asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--small", action="store_true", help="a tiny head: do all of this, measure nothing")
    parser.add_argument("--write", type=Path, nargs="?", const=DOCS, metavar="FOLDER")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU is to be seen; --device cpu --small tries what needs none")
    bench = Bench(SMALL if options.small else HEAD, options.device)
    console = Console(width=max(150, Console().width), log_path=False)
    results, three, four = measure(bench, options.rounds, console)
    rows = [cells(result, three) for result in (three, four, *results)]
    lines = [*verdicts(bench, results, three, four), machine(options.device)]
    title = f"{bench.head.title} ({bench.head.shape})"
    console.print(terminal(title, rows, lines))
    if options.write:
        options.write.mkdir(parents=True, exist_ok=True)
        text = "# The loss on a GPU, measured\n\nWritten by `benchmarks/loss_gpu.py --write`.\n\n"
        (options.write / "loss_gpu.md").write_text(text + markdown(title, rows, lines), encoding="utf-8")


if __name__ == "__main__":
    main()
