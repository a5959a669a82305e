"""How long lineage and the registry take in a large store: a million documents, ten thousand artifacts.

    python benchmarks/registry.py [--documents N] [--families N]

A family is a data set that lists its documents, its tokens, 49 models in lines of seven, and a score of each.
The first model of the first family is the base of every family, so a document of the first data set was seen
by nearly all artifacts: the longest walk there is. SQLite on this machine's disk; the median and the worst of
the repetitions, each with a store opened anew, as a command does (the opening is not counted).
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as Shown
from sqlalchemy import insert

from gyrocompass.core.acts import check_chain
from gyrocompass.core.config import parse
from gyrocompass.core.lineage import render, walk
from gyrocompass.core.store import Store
from gyrocompass.core.tables import ArtifactRow, EdgeRow, KnownDocument, ListingRow
from gyrocompass.govern.promote import PromotionRule, promote
from gyrocompass.govern.registry import point, register, resolve, roll_back

_LINES, _LONG = 7, 7
_BATCH = 20_000
Row = dict[str, Any]


def named(kind: str, number: int) -> str:
    """An id as hashes give it."""
    digits = hashlib.sha256(f"{kind} {number}".encode()).hexdigest()[:16]
    return f"{kind}-{digits}" if kind else digits


def artifacts(families: int) -> Iterator[tuple[Row, list[Row]]]:
    """Rows of artifacts, each with the edges to what it was made from."""

    def one(name: str, **parents: str) -> tuple[Row, list[Row]]:
        kind, _, digits = name.partition("-")
        row = {
            "id": name,
            "kind": kind,
            "content_hash": digits * 4,
            "code_version": "0",
            "created_at": "2026",
            "recipe": {"kind": kind, "objective": ["nll"], "optimizer": {"learning_rate": 0.001}},
            "counts": {"steps": 100, "tokens": 10**6},
            "lists_documents": kind == "dataset",
        }
        return row, [{"child_id": name, "role": role, "parent_id": above} for role, above in parents.items()]

    base = ""
    for family in range(families):
        data, tokens = named("dataset", family), named("tokens", family)
        yield one(data)
        yield one(tokens, documents=data)
        for line in range(_LINES):
            before = base
            for place in range(_LONG):
                number = (family * _LINES + line) * _LONG + place
                above = {"model": before} if before else {}
                before = named("model", number)
                yield one(before, data=tokens, **above)
                yield one(named("score", number), model=before)
                base = base or before


def fill(store: Store, documents: int, families: int) -> None:
    """Write the rows as landing an artifact does, many to a transaction."""
    with store.database.write() as connection:
        pairs = list(artifacts(families))
        connection.execute(insert(ArtifactRow), [row for row, _ in pairs])
        connection.execute(insert(EdgeRow), [edge for _, edges in pairs for edge in edges])
        each = documents // families
        for start in range(0, documents, _BATCH):
            numbers = range(start, min(documents, start + _BATCH))
            known = [{"id": named("", n), "path": f"part/{n}.txt", "source": f"s{n % 5}"} for n in numbers]
            listed = [
                {
                    "artifact_id": named("dataset", min(n // each, families - 1)),
                    "document_id": named("", n),
                    "slice": f"slice/{n % 7}",
                    "status": "kept",
                }
                for n in numbers
            ]
            connection.execute(insert(KnownDocument), known)
            connection.execute(insert(ListingRow), listed)


def measured(act: Callable[[Store, int], object], root: Path, times: int) -> tuple[float, float]:
    """Milliseconds of an act, the median and the worst."""
    taken = []
    for number in range(times):
        store = Store(root, make=False)
        began = time.perf_counter()
        act(store, number)
        taken.append((time.perf_counter() - began) * 1000)
    return statistics.median(taken), max(taken)


def mlflow_acts(path: Path) -> dict[str, list[float]]:
    """Milliseconds of MLflow's registry for the same acts, in SQLite too; it keeps no chain."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{path}", registry_uri=f"sqlite:///{path}")
    client.create_registered_model("m")
    source = path.parent.as_uri()
    acts: dict[str, Callable[[int], object]] = {
        "MLflow: register a version": lambda n: client.create_model_version("m", source),
        "MLflow: move an alias": lambda n: client.set_registered_model_alias("m", "shadow", str(n % 40 + 1)),
        "MLflow: resolve an alias": lambda n: client.get_model_version_by_alias("m", "shadow"),
    }
    found: dict[str, list[float]] = {}
    for name, act in acts.items():
        found[name] = []
        for number in range(40):
            began = time.perf_counter()
            act(number)
            found[name].append((time.perf_counter() - began) * 1000)
    return found


def main() -> None:
    """Fill a store, measure, print."""
    reader = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    reader.add_argument("--documents", type=int, default=1_000_000)
    reader.add_argument("--families", type=int, default=100)
    options = reader.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "store"
        store = Store(root)
        fill(store, options.documents, options.families)
        small = []
        for number in range(40):
            with store.create(f"small{number}", "model") as draft:
                (draft.path / "x").write_text(str(number))
                draft.documents = ()
            small.append(draft.artifact.id)
        rule = parse(PromotionRule, {"name": "r", "clauses": [{"kind": "approval", "by": ["ann"]}]}, "rule")
        first, last = named("", 0), named("", options.documents - 1)
        acts: list[tuple[str, Callable[[Store, int], object], int]] = [
            ("walk from a document that nearly all saw", lambda store, _: walk(store, first), 5),
            ("the same, drawn as a tree", lambda store, _: render(walk(store, first)), 5),
            ("walk from a document of one family", lambda store, _: walk(store, last), 5),
            ("walk from the base of all", lambda store, _: walk(store, named("model", 0)), 5),
            ("register a version", lambda store, n: register(store, "m", small[n], "ann"), 40),
            ("move an alias", lambda store, n: point(store, "m", "shadow", n % 40 + 1, "ann"), 40),
            ("resolve NAME@ALIAS", lambda store, _: resolve(store, "m@shadow"), 40),
            ("promote", lambda store, n: promote(store, "m", n + 1, rule, "ann", ["ann"]), 20),
            ("roll back", lambda store, _: roll_back(store, "m", "ann"), 15),
            ("check the chain", lambda store, _: check_chain(store.database), 5),
        ]  # fmt: skip
        table = Shown("act", "median, ms", "worst, ms", "repetitions")
        for name, act, times in acts:
            median, worst = measured(act, root, times)
            table.add_row(name, f"{median:,.1f}", f"{worst:,.1f}", str(times))
        for name, milliseconds in mlflow_acts(Path(folder) / "mlflow.db").items():
            table.add_row(name, f"{statistics.median(milliseconds):,.1f}", f"{max(milliseconds):,.1f}", "40")
        size = sum(1 for _ in artifacts(options.families))
        console = Console()
        console.print(f"{options.documents:,} documents, {size:,} artifacts")
        console.print(table)


if __name__ == "__main__":
    main()
