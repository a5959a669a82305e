"""`gyro registry`, `promote`, `rollback`, `audit`: which artifact is which, and how it came to be."""

from __future__ import annotations

import argparse
import json
import time
from datetime import UTC, datetime

from rich.console import Console
from rich.table import Table

from gyrocompass.core.acts import acts, check_chain
from gyrocompass.core.config import load_yaml, parse
from gyrocompass.core.errors import BadInput
from gyrocompass.core.store import Store
from gyrocompass.govern.promote import PromotionRule
from gyrocompass.govern.promote import promote as judge
from gyrocompass.govern.registry import artifact_named, point, register, roll_back, versions


def registry(options: argparse.Namespace) -> int:
    """Add, list, or point."""
    store = Store(options.store, options.store_url, make=False)
    if options.action == "add":
        found = register(store, options.name, options.artifact, options.by, options.policy)
        print(f"{found.name}:{found.version}  {found.artifact_id}")
        return 0
    if options.action == "alias":
        point(store, options.name, options.alias, options.version, options.by)
        print(f"{options.name}@{options.alias} is {options.name}:{options.version}")
        return 0
    if options.action == "mirror":
        from gyrocompass.govern.mirror import mirror

        done = mirror(store, options.uri)
        print(
            f"{done.uri}: {done.names} new names, {done.versions} new versions, {done.aliases} aliases moved"
        )
        return 0
    known = versions(store, options.name)
    if options.json:
        print(json.dumps([one._asdict() for one in known], indent=2))
        return 0
    table = Table()
    for head in ("name", "version", "artifact", "aliases", "when", "by"):
        table.add_column(head)
    for one in known:
        when = datetime.fromtimestamp(one.at, UTC).strftime("%Y-%m-%d %H:%M")
        table.add_row(one.name, str(one.version), one.artifact_id, ", ".join(one.aliases), when, one.by)
    Console(highlight=False).print(table)
    return 0


def promote(options: argparse.Namespace) -> int:
    """Judge by the rule; 1 where a clause does not hold."""
    rule = parse(PromotionRule, load_yaml(options.rule))
    store = Store(options.store, options.store_url, make=False)
    found = judge(store, options.name, options.version, rule, options.by, options.approve)
    if options.json:
        about = {"decision": found.artifact.id, "promoted": found.promoted}
        print(json.dumps(about | {"clauses": [one._asdict() for one in found.clauses]}, indent=2))
        return int(not found.promoted)
    table = Table()
    for head in ("", "clause", "why"):
        table.add_column(head)
    for one in found.clauses:
        held = "[green]holds[/]" if one.holds else "[bold red]fails[/]"
        table.add_row(held, str(one.clause["kind"]), one.why.replace("[", "\\["))
    console = Console(highlight=False)
    console.print(table)
    outcome = "is champion" if found.promoted else "is refused"
    console.print(f"{options.name}:{options.version} {outcome}; the decision is {found.artifact.id}")
    return int(not found.promoted)


def rollback(options: argparse.Namespace) -> int:
    """Back to the champion before."""
    began = time.monotonic()
    found = roll_back(Store(options.store, options.store_url, make=False), options.name, options.by)
    took = time.monotonic() - began
    print(f"{found.name}:{found.version} is champion again ({found.artifact_id}), in {took:.2f} s")
    return 0


def audit(options: argparse.Namespace) -> int:
    """Check the chain; 1 where it is broken."""
    store = Store(options.store, options.store_url, make=False)
    broken = check_chain(store.database)
    count = len(acts(store.database))
    if broken is None:
        print(f"{count} acts, each follows from those before it")
        return 0
    print(f"act {broken} of {count} was changed, or one before it was taken out")
    return 1


def card(options: argparse.Namespace) -> int:
    """Print a model's card, or write it."""
    from gyrocompass.govern.card import model_card  # reads Parquet, which no other verb here does

    use = None
    if options.intended_use is not None:
        try:
            use = options.intended_use.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(f"the intended use cannot be read: {error}", where=options.intended_use) from error
    store = Store(options.store, options.store_url, make=False)
    text = model_card(store, artifact_named(store, options.model), use)
    if options.out is None:
        print(text, end="")
        return 0
    try:
        options.out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise BadInput(f"the card cannot be written: {error.strerror}", where=options.out) from error
    print(options.out)
    return 0
