"""`gyro rollout`: a version is tried on users, and what is known of it so far."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from gyrocompass.core.config import load_yaml, parse
from gyrocompass.core.errors import BadInput
from gyrocompass.core.store import Store
from gyrocompass.govern.rollout import Known, Rollout, RolloutPlan, look, rollouts, start, stop


def rollout(options: argparse.Namespace) -> int:
    """Start, show or stop; 1 where the last one was rolled back."""
    console = Console(highlight=False, markup=False)
    if options.action == "start":
        plan = parse(RolloutPlan, load_yaml(options.plan))
        store = Store(options.store, options.store_url, make=False)
        found = start(store, options.name, options.version, plan, options.by)
        console.print(
            f"{found.name}:{found.version} is tried as {plan.mode} on {plan.part:.0%} of the users, beside "
            f"{found.name}:{found.champion}"
        )
        return 0
    store = Store(options.store, options.store_url, make=False)
    if options.action == "stop":
        found = stop(store, options.name, options.by, options.why)
        console.print(f"{found.name}:{found.version} is {found.state}: {found.why}")
        return 0
    known = rollouts(store, options.name)
    if not known:
        raise BadInput(f"nothing of {options.name} was ever tried", fix="gyro rollout start")
    last = known[-1]
    figures = look(store, last) if last.state == "running" else [Known(**one) for one in last.found]
    if options.json:
        print(json.dumps(_told(last, figures), indent=2))
    else:
        _show(console, last, figures)
    return int(last.state == "rolled back")


def _told(found: Rollout, known: Sequence[Known]) -> dict[str, Any]:
    told = found._asdict() | {"plan": found.plan.model_dump(mode="json"), "found": []}
    for one in known:
        (champion, challenger) = one.shares()
        told["found"].append(one._asdict() | {"champion": champion, "challenger": challenger})
    return told


def _show(console: Console, found: Rollout, known: Sequence[Known]) -> None:
    table = Table(box=None)
    sides = ("champion [95%]", "users", "challenger [95%]", "users")
    for head in ("guardrail", *sides, "margin", "p crossed", "p kept"):
        table.add_column(head, overflow="fold")
    for one in known:
        shown = [f"{share:.1%} [{low:.1%}, {high:.1%}]" for share, low, high in one.shares()]
        table.add_row(
            one.measure, shown[0], f"{one.champion_users:,}", shown[1], f"{one.challenger_users:,}",
            f"{one.margin:.1%}", f"{one.p_crossed:.3g}", f"{one.p_within:.3g}",
        )  # fmt: skip
    console.print(table)
    why = f": {found.why}" if found.why else ""
    console.print(f"{found.name}:{found.version} ({found.plan.mode}) is {found.state}{why}")
