"""A whole curation beside datatrove's: documents per CPU second, in one run.

    python benchmarks/data_pipeline.py --corpus FOLDER --peers PYTHON             (some minutes)
    python benchmarks/data_pipeline.py --corpus FOLDER --peers PYTHON --write     (into docs/benchmarks)

A corpus is a folder with `docs.jsonl` ({"id", "text"}), as `dedup_corpus.py` makes it. Both read the same
lines and do the same kinds of work, each with one process, from the file to documents on disk:

    datatrove   Gopher's repetition and quality, FineWeb's quality, personal data masked,
                MinHash in its four stages (signatures, buckets, clusters, filter)
    ours        repetition, quality, personal data masked, exact and near-duplicates (candidates verified),
                secrets and licences too, a ledger with the reason of every document that went

CPU seconds are those of each process and its children, imports counted. What stays differs, since the rules
do; the table says how much. `--peers` names the interpreter of an environment with datatrove and what its
word tokenizer for English needs (spacy).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path

from loss_tables import machine
from rich.console import Console
from rich.table import Table

WANTED = 5.0

OURS = """\
name: pipeline
sources:
  - files: {{path: {data}, slice: prose}}
steps: [exact_duplicates, repetition, quality, personal, secrets, licences, near_duplicates]
rules:
  - drop: {{column: exact_duplicates.duplicate}}
  - drop: {{column: repetition.top_2gram, above: 0.2}}
  - drop: {{column: quality.broken, above: 0}}
  - drop: {{column: near_duplicates.duplicate}}
  - mask: {{column: personal.spans, min_score: 0.5}}
  - mask: {{column: secrets.spans, min_score: 0.5}}
"""

THEIRS = """\
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import (
    MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature,
)
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.filters import FineWebQualityFilter, GopherQualityFilter, GopherRepetitionFilter
from datatrove.pipeline.formatters import PIIFormatter
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter

data, out = sys.argv[1:]
config = MinhashConfig()


def run(name, *pipeline, tasks=1):
    LocalPipelineExecutor(
        pipeline=list(pipeline), tasks=tasks, workers=1, logging_dir=f"{out}/logs/{name}",
    ).run()


run(
    "filters", JsonlReader(data), GopherRepetitionFilter(), GopherQualityFilter(), FineWebQualityFilter(),
    PIIFormatter(), JsonlWriter(f"{out}/filtered"),
)
run("signatures", JsonlReader(f"{out}/filtered"), MinhashDedupSignature(f"{out}/signatures", config))
run(
    "buckets", MinhashDedupBuckets(f"{out}/signatures", f"{out}/buckets", config=config),
    tasks=config.num_buckets,
)
run("clusters", MinhashDedupCluster(f"{out}/buckets", f"{out}/removed", config=config))
run(
    "deduplicated", JsonlReader(f"{out}/filtered"), MinhashDedupFilter(f"{out}/removed"),
    JsonlWriter(f"{out}/kept"),
)
"""


def cpu_of(command: list[str], environment: dict[str, str]) -> float:
    """CPU seconds of a command with all it starts.

    Raises:
        RuntimeError: it failed.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    if run.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{run.stdout[-2000:]}\n{run.stderr[-4000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--peers", required=True, help="an interpreter that has datatrove")
    parser.add_argument("--documents", type=int, default=10_000)
    parser.add_argument("--write", action="store_true", help="into docs/benchmarks")
    options = parser.parse_args()
    console = Console()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data = folder / "data"
        data.mkdir()
        with (options.corpus / "docs.jsonl").open(encoding="utf-8") as lines:
            rows = [json.loads(line) for line in islice(lines, options.documents)]
        text = "\n".join(json.dumps({"id": str(row["id"]), "text": row["text"]}) for row in rows)
        (data / "docs.jsonl").write_text(text + "\n", encoding="utf-8")
        (folder / "build.yaml").write_text(OURS.format(data=data / "docs.jsonl"), encoding="utf-8")
        (folder / "theirs.py").write_text(THEIRS, encoding="utf-8")
        console.print("ours ...")
        build = [
            sys.executable,
            "-m",
            "gyrocompass",
            "data",
            "build",
            str(folder / "build.yaml"),
            "--workers",
            "1",
        ]
        own = cpu_of([*build, "--store", str(folder / "store"), "--json"], environment)
        console.print("datatrove ...")
        its = cpu_of([options.peers, str(folder / "theirs.py"), str(data), str(folder / "out")], environment)
        kept = _kept(folder)
    table = Table()
    for head in ("", "CPU s", "documents per CPU second", "/ ours", "kept"):
        table.add_column(head)
    count = len(rows)
    cells = [
        ["ours", f"{own:.1f}", f"{count / own:.0f}", "1.00", f"{kept[0]:,}"],
        ["datatrove", f"{its:.1f}", f"{count / its:.0f}", f"{own / its:.2f}", f"{kept[1]:,}"],
    ]
    for row in cells:
        table.add_row(*row)
    console.print(table)
    lines_ = [
        "# A whole curation, measured",
        "",
        "Written by `benchmarks/data_pipeline.py`, whose first lines say how to read it.",
        "",
        "|  | CPU s | documents per CPU second | / ours | kept |",
        "| --- | ---: | ---: | ---: | ---: |",
        *("| " + " | ".join(row) + " |" for row in cells),
        "",
        f"- {count:,} documents; ours does {its / own:.1f} times as many in a CPU second "
        f"(wanted: at least {WANTED:.0f})",
        f"- {machine()}",
    ]
    target = Path("docs/benchmarks" if options.write else "build/benchmarks")
    target.mkdir(parents=True, exist_ok=True)
    (target / "data_pipeline.md").write_text("\n".join(lines_) + "\n", encoding="utf-8")
    console.print(f"written: {(target / 'data_pipeline.md').absolute()}")


def _kept(folder: Path) -> tuple[int, int]:
    """Documents that each let through."""
    import gzip

    import pyarrow.parquet as pq

    own = sum(
        pq.read_metadata(path).num_rows
        for path in folder.glob("store/artifacts/dataset-*/documents-*.parquet")
    )
    theirs = 0
    for path in folder.glob("out/kept/*.jsonl.gz"):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            theirs += sum(1 for _ in lines)
    return own, theirs


if __name__ == "__main__":
    main()
