"""`gyro feedback export`: training data of what people decided."""

from __future__ import annotations

import argparse
import json
import shutil
import time

from rich.console import Console
from rich.table import Table

from gyrocompass.core.store import Store


def feedback(options: argparse.Namespace) -> int:
    """Write an artifact of what was decided."""
    from gyrocompass.serve.feedback import FILES, export

    store = Store(options.store, options.store_url, make=False)
    since = 0.0 if options.days is None else time.time() - options.days * 86400
    done = export(store, since=since, all_texts=options.all_texts)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            shutil.copyfile(done.artifact.path / f"{name}.jsonl", options.out / f"{name}.jsonl")
    if options.json:
        about = {
            "artifact": done.artifact.id,
            "records": done.records,
            "without_consent": done.without_consent,
        }
        print(json.dumps(about, indent=2))
        return 0
    console = Console(highlight=False)
    table = Table()
    for head in ("file", "records"):
        table.add_column(head)
    for name, count in done.records.items():
        table.add_row(f"{name}.jsonl", f"{count:,}")
    console.print(table)
    console.print(f"{done.artifact.id} at {done.artifact.path}")
    if done.without_consent:
        console.print(
            f"left out, since their users did not agree: the texts of {done.without_consent:,} reviews"
        )
    return 0
