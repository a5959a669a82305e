"""`gyro keys`: who may ask a server."""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime

from rich.console import Console
from rich.table import Table

from gyrocompass.core.errors import MissingDependency
from gyrocompass.core.store import Store


def keys(options: argparse.Namespace) -> int:
    """Make, list or revoke keys."""
    try:
        from gyrocompass.serve.keys import create_key, list_keys, revoke_key
    except ImportError as error:
        raise MissingDependency(error.name or "argon2-cffi", extra="serve", needed_for="gyro keys") from error
    database = Store(options.store, options.store_url).database
    if options.action == "create":
        key = create_key(
            database,
            options.name,
            options.scopes,
            tier=options.tier,
            requests_per_minute=options.requests_per_minute,
        )
        print(key)
        return 0
    if options.action == "revoke":
        revoke_key(database, options.id)
        print(f"{options.id} is revoked; servers that run let go of it within a minute")
        return 0
    found = list_keys(database)
    if options.json:
        print(json.dumps(found, indent=2))
        return 0
    table = Table()
    for head in ("id", "name", "scopes", "tier", "requests a minute", "made", "revoked"):
        table.add_column(head)
    for row in found:
        rate = row["requests_per_minute"]
        table.add_row(
            row["id"],
            row["name"],
            ", ".join(row["scopes"]),
            row["tier"],
            "" if rate is None else f"{rate:g}",
            _day(row["created_at"]),
            _day(row["revoked_at"]),
        )
    Console(highlight=False).print(table)
    return 0


def _day(at: float | None) -> str:
    return "" if at is None else datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M")
