"""`gyro diff A B`: two data sets, two recipes, two models, or any two artifacts of one kind."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gyrocompass.core.store import Store
from gyrocompass.data.curate.dataset import LEAVES
from gyrocompass.govern.difference import ABSENT, Difference, Setting, difference, settings_between
from gyrocompass.govern.registry import artifact_named
from gyrocompass.measure.intervals import Estimate
from gyrocompass.recipe import report_format as fmt


def diff(options: argparse.Namespace) -> int:
    """Show what differs."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    if all(map(_is_recipe, (options.a, options.b))):
        from gyrocompass.recipe.recipe import load_recipe

        recipes = [load_recipe(one, (), options.variant) for one in (options.a, options.b)]
        before, after = (recipe.model_dump(mode="json") for recipe in recipes)
        settings = [*settings_between(before, after)]
        if options.json:
            print(json.dumps([one._asdict() for one in settings], indent=2, ensure_ascii=False))
        elif settings:
            _print_settings(settings, console)
        else:
            console.print("nothing differs")
        return 0
    store = Store(options.store, options.store_url, make=False)
    names = [artifact_named(store, name) for name in (options.a, options.b)]
    if all((store.open(name, verify=False).path / LEAVES).is_file() for name in names):
        from gyrocompass.cli.data import show_difference

        return show_difference(store, *names, rows=20, as_json=options.json)
    found = difference(store, *names)
    if options.json:
        from gyrocompass.cli.data import plain

        print(json.dumps(plain(found), indent=2, ensure_ascii=False))
    else:
        _print_difference(found, console)
    return 0


def _is_recipe(name: str) -> bool:
    if Path(name).suffix in (".yaml", ".yml"):
        return True
    if "-" in name or "@" in name or ":" in name:
        return False
    from gyrocompass.recipe.recipe import builtin_names

    return name in builtin_names()


def _print_difference(found: Difference, console: Console) -> None:
    """In tables; what is the same is left out."""
    if found.before == found.after:
        console.print(f"both are {found.before}")
        return
    console.print(f"{found.before} -> {found.after}")
    for origin in found.origins:
        console.print(f"{origin.role}: {origin.before or ABSENT} -> {origin.after or ABSENT}")
        _print_settings(origin.settings, console)
    changed = {name: pair for name, pair in found.documents.items() if pair[0] != pair[1]}
    if changed:
        table = _table("documents learned from", ("slice", "before", "after", "change"))
        for name, (one, other) in changed.items():
            table.add_row(Text(name), fmt.count(one), fmt.count(other), f"{other - one:+,}")
        console.print(table)
    if found.likelihood:
        title = "nats per token on the same held-out documents, after less before"
        table = _table(title, ("slice", "difference [95%]", "p (Holm)", "groups", "tokens"))
        for line in found.likelihood:
            gap = line.result
            table.add_row(
                Text(line.slice),
                f"{fmt.signed(gap.difference)} {fmt.interval(gap.low, gap.high)}",
                fmt.figure(line.p_adjusted),
                fmt.count(gap.groups),
                fmt.count(gap.weight),
            )
        console.print(table)
    if found.figures:
        heads = ("task", "measure", "slice", "before [95%]", "after [95%]", "change [95%]", "items")
        table = _table("figures", heads)
        for figure in found.figures:
            table.add_row(
                Text(figure.task),
                figure.measure,
                Text(figure.slice),
                *(f"{fmt.figure(one.value)} {fmt.interval(one.low, one.high)}" for one in figure[3:5]),
                _change(figure.difference),
                " and ".join(dict.fromkeys(map(fmt.count, figure.items))),
            )
        console.print(table)


def _print_settings(settings: Sequence[Setting], console: Console) -> None:
    """One line for each value."""
    for one in settings:
        console.print(f"    {one.path}: {_short(one.before)} -> {_short(one.after)}")


def _change(change: Estimate | None) -> str:
    if change is None:
        return "no group in common"
    return f"{fmt.signed(change.value)} {fmt.interval(change.low, change.high)}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


def _table(title: str, heads: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None)
    for head in heads:
        table.add_column(head, overflow="fold")
    return table
