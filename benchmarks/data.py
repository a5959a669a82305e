"""What curation costs beside what others offer, and how much it finds.

    python benchmarks/data.py --corpus FOLDER            (about 4 minutes on 2 cores, and 5 more for scaling)
    python benchmarks/data.py --corpus FOLDER --no-scaling
    python benchmarks/data.py --small                    (a corpus made here: do all of this, measure nothing)
    python benchmarks/data.py --corpus FOLDER --write    (into docs/benchmarks instead of build/benchmarks)

A corpus is a folder with `docs.jsonl` ({"id", "text"}) and `truth.tsv` (id, id, Jaccard similarity: all pairs
at or above 0.4), made by `dedup_corpus.py`. The table is written as data.md; the path is printed.

Each contender runs in a process of its own, `--rounds` times, in turns. CPU seconds are those of the whole
process, imports and reading included; the table has the least of the rounds. Peers are no dependencies:
`--peers` names the interpreter of an environment that has them (rensa, datasketch); who is absent has a row
that says so.

Recall is the share of the true pairs that were found; precision the share of the found pairs that are true. A
pair is true if its Jaccard similarity over runs of five words is at least 0.7.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from data_contenders import CONTENDERS, THRESHOLD, Pair
from rich.console import Console
from rich.table import Table

from gyrocompass.data.curate.planted_duplicates import Measured, all_similarities, measured, plant

_ROOT = Path(__file__).parents[1]
_WORKER = Path(__file__).with_name("data_worker.py")
DOCS, BUILD = _ROOT / "docs" / "benchmarks", _ROOT / "build" / "benchmarks"
MB = 10**6
SIZES = (10_000, 30_000, 100_000, 300_000, 1_000_000)
SMALL_SIZES = (1_000, 2_000)
MEMORY_MB = 32

COLUMNS = ("", "CPU s", "/ ours", "wall s", "peak MB", "/ ours", "recall", "precision", "pairs")
SCALING_COLUMNS = (
    "documents",
    "text MB",
    "CPU s",
    "ms each",
    "peak MB",
    "kB each",
    "compared",
    "found",
    "dropped",
)


class Run(NamedTuple):
    """A contender over the rounds."""

    title: str
    version: str | None
    cpu_s: float = 0.0
    wall_s: float = 0.0
    peak_bytes: int = 0
    quality: Measured | None = None


def read_truth(folder: Path) -> set[Pair]:
    """The pairs at or above the threshold."""
    rows = (line.split("\t") for line in (folder / "truth.tsv").read_text().splitlines())
    return {(int(one), int(other)) for one, other, jaccard in rows if float(jaccard) >= THRESHOLD}


def small_corpus(folder: Path) -> None:
    """Modules of the standard library, with planted variants."""
    paths = sorted(Path(json.__file__).parents[1].glob("*.py"))[:40]
    planted = plant([path.read_text(encoding="utf-8", errors="replace")[:4000] for path in paths], share=0.7)
    with (folder / "docs.jsonl").open("w", encoding="utf-8") as lines:
        for number, text in enumerate(planted.texts):
            lines.write(json.dumps({"id": number, "text": text}) + "\n")
    similarities = all_similarities(planted.texts, 5)
    rows = (f"{one}\t{other}\t{jaccard:.6f}\n" for (one, other), jaccard in similarities.items())
    (folder / "truth.tsv").write_text("".join(rows), encoding="utf-8")


def worker(python: str, *arguments: object) -> Any:
    """Run `data_worker.py` and read its last line.

    Raises:
        RuntimeError: it failed.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    run = subprocess.run(
        [python, str(_WORKER), *map(str, arguments)], capture_output=True, text=True, env=environment
    )
    if run.returncode:
        raise RuntimeError(f"{' '.join(map(str, arguments))}:\n{run.stderr}")
    return json.loads(run.stdout.splitlines()[-1])


def compare(corpus: Path, rounds: int, peers: str, console: Console) -> list[Run]:
    """Every contender on one corpus, in turns."""
    truth = read_truth(corpus)
    pythons = {name: sys.executable if name == "ours" else peers for name in CONTENDERS}
    runs = {name: Run(c.title, worker(pythons[name], "version", name)) for name, c in CONTENDERS.items()}
    with tempfile.TemporaryDirectory() as folder:
        pairs_path = Path(folder) / "pairs.tsv"
        for number in range(rounds):
            for name, run in runs.items():
                if run.version is None:
                    continue
                console.log(f"near-duplicates, round {number + 1} of {rounds}: {run.title}")
                took = worker(pythons[name], "duplicates", name, corpus / "docs.jsonl", pairs_path)
                if run.quality is None:
                    rows = (line.split("\t") for line in pairs_path.read_text().splitlines())
                    quality = measured(((int(one), int(other)) for one, other in rows), truth)
                    runs[name] = run._replace(**took, quality=quality)
                elif took["cpu_s"] < run.cpu_s:
                    runs[name] = run._replace(**took)
    return list(runs.values())


def cells(run: Run, ours: Run) -> list[str]:
    """A row, as text."""
    if run.quality is None:
        return [run.title, "not installed", *[""] * (len(COLUMNS) - 2)]
    return [
        run.title,
        f"{run.cpu_s:.2f}",
        f"{run.cpu_s / ours.cpu_s:.2f}",
        f"{run.wall_s:.2f}",
        f"{run.peak_bytes / MB:.0f}",
        f"{run.peak_bytes / ours.peak_bytes:.2f}",
        f"{run.quality.recall:.4f}",
        f"{run.quality.precision:.4f}",
        str(run.quality.n_found),
    ]


def scaling(sizes: Sequence[int], console: Console) -> list[list[str]]:
    """Rows of made corpora of growing size, and one more without a limit of memory."""
    rows = []
    for n_documents in sizes:
        console.log(f"scaling: {n_documents:,} documents")
        took = worker(sys.executable, "scaling", n_documents, MEMORY_MB)
        rows.append(
            [
                f"{n_documents:,}",
                f"{took['text_bytes'] / MB:.0f}",
                f"{took['cpu_s']:.1f}",
                f"{1000 * took['cpu_s'] / n_documents:.3f}",
                f"{took['peak_bytes'] / MB:.0f}",
                f"{took['peak_bytes'] / 1000 / n_documents:.2f}",
                f"{took['compared']:,}",
                f"{took['found'] / max(took['variants'], 1):.4f}",
                f"{took['dropped']:,}",
            ]
        )
    return rows


def machine(peers: Sequence[Run]) -> str:
    """What it runs on, now."""
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    info = Path("/proc/cpuinfo")
    names = (
        [line for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    processor = names[0].split(":")[1].strip() if names else platform.processor() or platform.machine()
    versions = [f"Python {platform.python_version()}, numpy {np.__version__}, pyarrow {pa.__version__}"]
    versions += [f"{run.title.split(':')[0]} {run.version}" for run in peers if run.version]
    return f"{today}: {processor}, {os.cpu_count()} cores, load {load}, {', '.join(versions)}"


def markdown(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], lines: Sequence[str]) -> str:
    """For the repository."""
    ruled = [list(columns), ["---", *["---:"] * (len(columns) - 1)], *rows]
    table = "\n".join("| " + " | ".join(row) + " |" for row in ruled)
    return f"## {title}\n\n{table}\n\n" + "\n".join(f"- {line}" for line in lines) + "\n"


def terminal(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], lines: Sequence[str]
) -> Table:
    """For people at a terminal."""
    table = Table(title=title, title_justify="left", caption="\n".join(lines), caption_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


HEADER = """# Curation, measured

Written by `benchmarks/data.py`, whose first lines say how to read it.
"""


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, help="a folder with docs.jsonl and truth.tsv")
    parser.add_argument("--rounds", type=int, default=2, help="how often each contender runs (default: 2)")
    parser.add_argument("--peers", default=sys.executable, help="the interpreter that has the peers")
    parser.add_argument("--no-scaling", action="store_true", help="leave the made corpora out")
    parser.add_argument("--small", action="store_true", help="a tiny corpus: do all of this, measure nothing")
    parser.add_argument(
        "--write", type=Path, nargs="?", const=DOCS, metavar="FOLDER", help="where to (docs/benchmarks)"
    )
    options = parser.parse_args()
    if not options.small and (options.corpus is None or not (options.corpus / "truth.tsv").is_file()):
        parser.error("--corpus FOLDER: a folder with docs.jsonl and truth.tsv, or --small")
    console = Console(width=max(150, Console().width), log_path=False)
    parts = [HEADER]

    def report(
        title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], lines: Sequence[str]
    ) -> None:
        console.print(terminal(title, columns, rows, lines))
        parts.append(markdown(title, columns, rows, lines))

    with tempfile.TemporaryDirectory() as made:
        corpus = options.corpus or Path(made)
        if options.small:
            small_corpus(corpus)
        runs = compare(corpus, options.rounds, options.peers, console)
        size = (corpus / "docs.jsonl").stat().st_size
    ours = runs[0]
    assert ours.quality is not None
    lines = [
        f"{ours.quality.n_true} true pairs in {size / MB:.1f} MB of JSON lines; {options.rounds} rounds",
        "wanted of ours: recall at least 0.999, precision 1, at most 10 CPU s and 250 MB",
        machine(runs),
    ]
    report("Near-duplicates", COLUMNS, [cells(run, ours) for run in runs], lines)
    if not options.no_scaling:
        rows = scaling(SMALL_SIZES if options.small else SIZES, console)
        lines = [
            f"made documents, one in five a variant of another; {MEMORY_MB} MiB of the index in memory",
            "found: share of the variants in one cluster with what they were made from",
            machine(()),
        ]
        report("Near-duplicates, by size", SCALING_COLUMNS, rows, lines)
    folder: Path = options.write or BUILD
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data.md").write_text("\n".join(parts), encoding="utf-8")
    console.print(f"written: {folder / 'data.md'}", soft_wrap=True, markup=False)


if __name__ == "__main__":
    main()
