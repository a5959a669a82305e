"""A whole pipeline beside datatrove's: documents in a CPU-second, all processes together.

    python benchmarks/data_pipeline.py --corpus FOLDER --peers PYTHON --documents 2000

Both read the same lines of JSON, one worker each, and write what stays: repetition, quality, personal data
and near-duplicates. Ours also looks for exact duplicates, languages, secrets and licences, which theirs does
not; its filter of languages is left out, for it downloads a model. CPU seconds are those of a process and its
children, imports included.
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

STEPS = (
    "exact_duplicates",
    "near_duplicates",
    "repetition",
    "quality",
    "language",
    "personal",
    "secrets",
    "licences",
)


SAME_STEPS = ("near_duplicates", "repetition", "quality", "personal")


def same_steps(lines: Path, folder: Path) -> None:
    """Ours, of the steps that theirs has too."""
    ours(lines, folder, SAME_STEPS)


def ours(lines: Path, folder: Path, steps: tuple[str, ...] = STEPS) -> None:
    """Build a data set."""
    copies = [name for name in ("exact_duplicates", "near_duplicates") if name in steps]
    build = {
        "name": "corpus",
        "sources": [{"jsonl": {"path": str(lines)}}],
        "steps": list(steps),
        "rules": [
            *({"drop": {"column": f"{name}.duplicate"}} for name in copies),
            {"mask": {"column": "personal.spans", "min_score": 0.5}},
        ],
    }
    (folder / "build.yaml").write_text(json.dumps(build), "utf-8")
    from gyrocompass.cli.main import main as gyro

    arguments = ["data", "build", str(folder / "build.yaml"), "--workers", "1"]
    assert gyro([*arguments, "--store", str(folder / "store")]) == 0


def datatrove(lines: Path, folder: Path) -> None:
    """Filters, then the four stages of MinHash, as its examples do."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import (
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.pipeline.filters import FineWebQualityFilter, GopherQualityFilter, GopherRepetitionFilter
    from datatrove.pipeline.formatters import PIIFormatter
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter

    config = MinhashConfig(n_grams=5, num_buckets=14, hashes_per_bucket=8)
    at = {name: str(folder / name) for name in ("filtered", "signatures", "buckets", "removed", "kept")}
    filters = [GopherRepetitionFilter(), GopherQualityFilter(), FineWebQualityFilter(), PIIFormatter()]
    read = JsonlReader(at["filtered"])
    stages = [
        [JsonlReader(str(lines.parent), glob_pattern=lines.name), *filters, JsonlWriter(at["filtered"])],
        [read, MinhashDedupSignature(output_folder=at["signatures"], config=config)],
        [MinhashDedupBuckets(at["signatures"], at["buckets"], config=config)],
        [MinhashDedupCluster(at["buckets"], at["removed"], config=config)],
        [read, MinhashDedupFilter(at["removed"]), JsonlWriter(at["kept"])],
    ]
    for number, stage in enumerate(stages):
        tasks = config.num_buckets if number == 2 else 1
        LocalPipelineExecutor(stage, tasks=tasks, workers=1, logging_dir=str(folder / f"log{number}")).run()


def cpu_seconds() -> float:
    """Of this process and of those it started that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


CONTENDERS = {"ours": ours, "ours, the same steps": same_steps, "datatrove": datatrove}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, required=True, help="a folder with docs.jsonl")
    parser.add_argument("--peers", default=sys.executable, help="the interpreter that has datatrove")
    parser.add_argument("--documents", type=int, default=2000, help="of the corpus (default: 2000)")
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        with tempfile.TemporaryDirectory() as folder:
            CONTENDERS[options.one](options.corpus, Path(folder))
        print(f"\n{cpu_seconds()}")
        return
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with (
        tempfile.TemporaryDirectory() as made,
        (options.corpus / "docs.jsonl").open(encoding="utf-8") as all_,
    ):
        lines = Path(made) / "docs.jsonl"
        chosen = (json.dumps({"id": str(row["id"]), "text": row["text"]}) for row in map(json.loads, all_))
        lines.write_text("\n".join(islice(chosen, options.documents)) + "\n", "utf-8")
        for name, python in zip(CONTENDERS, (sys.executable, sys.executable, options.peers), strict=True):
            command = [python, __file__, "--corpus", str(lines), "--one", name]
            run = subprocess.run(command, capture_output=True, text=True, env=environment)
            if run.returncode:
                print(f"{name}: {run.stderr[-2000:]}")
                continue
            spent = float(run.stdout.splitlines()[-1])
            print(f"{name}: {spent:.1f} CPU s, {options.documents / spent:.0f} documents in a CPU-second")
    print(f"load {' '.join(f'{value:.1f}' for value in os.getloadavg())}")


if __name__ == "__main__":
    main()
