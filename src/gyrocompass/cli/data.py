"""`gyro data build`, `why` and `diff`: data sets from raw files, and the reasons for what is in them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console

from gyrocompass.core.progress import Progress
from gyrocompass.core.store import Store
from gyrocompass.data.curate.build import Builder, Built, Stage
from gyrocompass.data.curate.config import load_build
from gyrocompass.data.curate.diff import diff as compare
from gyrocompass.data.curate.executor import Executor, LocalExecutor, RayExecutor
from gyrocompass.data.curate.show import funnel, print_build, print_difference, print_reasons
from gyrocompass.data.curate.versions import open_dataset, read_facts
from gyrocompass.data.curate.why import why as reasons_of


def data(options: argparse.Namespace) -> int:
    """One of the actions."""
    from gyrocompass.cli.data_inspect import export, inspect  # what they need takes longer to import

    actions: Mapping[str, Callable[[argparse.Namespace], int]] = {
        "build": _build,
        "inspect": inspect,
        "why": _why,
        "diff": _diff,
        "export": export,
    }
    return actions[options.action](options)


def executor_of(options: argparse.Namespace) -> Executor:
    """The executor that the options ask for."""
    return RayExecutor(options.workers) if options.ray else LocalExecutor(options.workers)


def _build(options: argparse.Namespace) -> int:
    config = load_build(options.file)
    with executor_of(options) as executor, Progress(quiet=options.json) as progress:
        builder = Builder(Store(options.store, options.store_url), executor, progress)
        built = builder.build(config, lambda stage: progress.note(_line(stage)))
    if options.json:
        print(json.dumps(_facts(built), indent=2, ensure_ascii=False))
        return 0
    console = Console()
    print_build(built.dataset, built.corpus, console)
    root = read_facts(built.dataset.path)["root"]
    console.print(f"\nroot {root}\n{built.dataset.path}", highlight=False, soft_wrap=True)
    return 0


def _facts(built: Built) -> dict[str, Any]:
    lines = [line._asdict() for line in funnel(built.dataset, built.corpus)]
    return {
        "dataset": built.dataset.id,
        "path": str(built.dataset.path),
        **read_facts(built.dataset.path),
        "funnel": lines,
    }


def _line(stage: Stage) -> str:
    how = "reused" if stage.reused else f"{stage.seconds:.1f} s"
    counts = ", ".join(
        f"{value:,} {name}"
        for name, value in stage.artifact.manifest.counts.items()
        if "/" not in name and value
    )
    return f"{stage.name}: {how}  {stage.artifact.id}  {counts}"


def _why(options: argparse.Namespace) -> int:
    store = Store(options.store, options.store_url, make=False)
    found = reasons_of(store, open_dataset(store, options.dataset), options.document)
    if options.json:
        print(json.dumps(plain(found), indent=2, ensure_ascii=False, default=str))
    else:
        print_reasons(found, Console())
    return 0


def _diff(options: argparse.Namespace) -> int:
    store = Store(options.store, options.store_url, make=False)
    return show_difference(store, options.before, options.after, rows=options.rows, as_json=options.json)


def show_difference(store: Store, before: str, after: str, *, rows: int, as_json: bool) -> int:
    """Print what differs between two data sets."""
    found = compare(*(open_dataset(store, name).path for name in (before, after)))
    if as_json:
        print(json.dumps({"same": found.same, **plain(found)}, indent=2, ensure_ascii=False))
    else:
        print_difference(found, Console(), rows)
    return 0


def plain(value: Any) -> Any:
    """Named tuples as objects, all the way down."""
    if hasattr(value, "_asdict"):
        return {name: plain(entry) for name, entry in value._asdict().items()}
    return [plain(entry) for entry in value] if isinstance(value, list | tuple) else value
