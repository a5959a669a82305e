"""`gyro loop`: learn from what people decide, again and again."""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gyrocompass.core.store import Store


def loop(options: argparse.Namespace) -> int:
    """Run it, or tell what became of its cycles."""
    from gyrocompass.recipe.loop.config import Loop
    from gyrocompass.recipe.loop.cycle import Cycle, cycles, run_loop

    read = Loop(options.file)
    store = Store(options.store, options.store_url, make=False)
    console = Console()
    if not options.status:
        cycle = run_loop(read, store, console, once=options.once, give_up=options.give_up)
        if cycle is None:
            console.print("nothing is due")
        return 0
    known: list[Cycle] = cycles(store, read.config.name)
    if options.json:
        print(json.dumps([cycle.model_dump(mode="json") for cycle in known], indent=2))
        return 0
    table = Table(box=None)
    for head in ("cycle", "began", "why", "version", "state", ""):
        table.add_column(head, overflow="fold")
    for cycle in known:
        began = datetime.fromtimestamp(cycle.began_at, UTC).strftime("%Y-%m-%d %H:%M")
        version = "" if cycle.version is None else f"{read.config.name}:{cycle.version}"
        table.add_row(str(cycle.number), began, Text(cycle.why), version, cycle.state, Text(cycle.told))
    console.print(table)
    return 0
