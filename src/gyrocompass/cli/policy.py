"""`gyro policy`: check a gate's policy, keep it, or try it on what was asked before."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gyrocompass.core.errors import BadInput
from gyrocompass.core.store import Store


def policy(options: argparse.Namespace) -> int:
    """Check, save or dry-run a policy."""
    from gyrocompass.serve.policy import keep_policy, load_policy

    read = load_policy(options.file)
    console = Console(highlight=False, markup=False)
    if options.action == "check":
        console.print(
            f"{read.id}: {len(read.rules)} rules, {len(read.scorers)} scorers, otherwise {read.otherwise}"
        )
        for place, rule in enumerate(read.rules):
            conditions = rule.when.model_dump(exclude_defaults=True, mode="json")
            told = ", ".join(f"{name} {value}" for name, value in conditions.items()) or "always"
            stage = "before and after" if not rule.when.needs_answer else "after the answer"
            console.print(f"  {place}  {rule.then:8}  {told}  ({stage})")
        return 0
    store = Store(options.store, options.store_url)
    if options.action == "save":
        kept = keep_policy(store, read, options.file.read_text(encoding="utf-8"))
        console.print(f"{kept.id}  {read.id}")
        return 0
    return _dry_run(options, read, store, console)


def _dry_run(options: argparse.Namespace, read: Any, store: Store, console: Console) -> int:
    from gyrocompass.serve.confidence import calibrated_for
    from gyrocompass.serve.dry_run import dry_run
    from gyrocompass.serve.events import read_events

    since = time.time() - options.days * 86400
    events = read_events(store.database, since) if options.events is None else _lines(options.events)
    found = dry_run(read, events, calibrated_for(read, store))
    if not found.judged and not found.unknown:
        raise BadInput(f"no answer was logged in the last {options.days:g} days", where=store.root)
    if options.json:
        about = found._asdict() | {
            "before": {name: one._asdict() for name, one in found.before.items()},
            "after": {name: one._asdict() for name, one in found.after.items()},
            "changed": [[*pair, count] for pair, count in found.changed.items()],
        }
        print(json.dumps(about, indent=2))
        return 0
    table = Table()
    for head in ("outcome", "was", "would be", "share then", "95%"):
        table.add_column(head)
    for name in sorted({*found.before, *found.after}):
        was, now = found.before.get(name), found.after.get(name)
        table.add_row(
            name,
            f"{was.answers:,}" if was else "0",
            f"{now.answers:,}" if now else "0",
            f"{now.share:.1%}" if now else "0%",
            f"{now.low:.1%} to {now.high:.1%}" if now else "",
        )
    console.print(table)
    console.print(
        f"{found.judged:,} answers judged; {found.unknown:,} could not be: their texts were not kept"
    )
    for (was_, now_), count in sorted(found.changed.items()):
        console.print(f"  {count:,}: {was_} -> {now_}")
    return 0


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield json.loads(line)
            except ValueError as error:
                raise BadInput(f"not JSON: {error}", where=f"{path}:{number}") from error
