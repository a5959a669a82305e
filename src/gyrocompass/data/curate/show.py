"""What people read on the terminal: the table of a build, why a document is where it is, what differs.

funnel(dataset, corpus) --> Step lines: what was read, what each rule took, what stays
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from gyrocompass.core.artifact import Artifact
from gyrocompass.data.curate.dataset import LEDGER, STATISTICS
from gyrocompass.data.curate.diff import Difference, Row
from gyrocompass.data.curate.versions import read_facts
from gyrocompass.data.curate.why import Reasons, Said

_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


class FunnelLine(NamedTuple):
    """One line of the way from what was read to what stays."""

    what: str
    documents: int
    bytes: int
    """0 where nobody counted."""
    left: int | None
    """Documents that are left after it; None where it is not about documents."""


def funnel(dataset: Artifact, corpus: Artifact) -> list[FunnelLine]:
    """What was read, what each rule took of it, in order, and what stays."""
    counts = corpus.manifest.counts
    left = int(counts["documents"])
    lines = [FunnelLine("read", left, int(counts["bytes"]), left)]
    lines += [
        FunnelLine(f"{what} while reading", int(counts[what]), 0, None)
        for what in ("quarantined", "skipped")
        if counts[what]
    ]
    ledger = pq.read_table(dataset.path / LEDGER, columns=["rule", "title", "n_bytes"])
    taken = ledger.group_by(["rule", "title"]).aggregate([("n_bytes", "count"), ("n_bytes", "sum")])
    for row in sorted(taken.to_pylist(), key=lambda row: (row["rule"], row["title"])):
        left -= row["n_bytes_count"]
        lines.append(FunnelLine(f"dropped: {row['title']}", row["n_bytes_count"], row["n_bytes_sum"], left))
    covered = int(dataset.manifest.counts["covered"])
    if covered:
        lines.append(FunnelLine("with spans covered", covered, 0, None))
    kept = dataset.manifest.counts
    lines.append(FunnelLine("kept", int(kept["documents"]), int(kept["bytes"]), int(kept["documents"])))
    return lines


def print_build(dataset: Artifact, corpus: Artifact, console: Console) -> None:
    """The table of a build: the funnel, and the slices of what stays."""
    table = Table(title=f"{read_facts(dataset.path)['name']}: from what was read to what stays")
    table.add_column("", overflow="fold")
    for head in ("documents", "content", "left"):
        table.add_column(head, justify="right")
    for line in funnel(dataset, corpus):
        left = "" if line.left is None else f"{line.left:,}"
        table.add_row(line.what, f"{line.documents:,}", size(line.bytes) if line.bytes else "", left)
    console.print(table)
    console.print(_slices(dataset))


def _slices(dataset: Artifact) -> Table:
    statistics = pq.read_table(dataset.path / STATISTICS)
    named = statistics.set_column(
        statistics.schema.get_field_index("licence"),
        "licence",
        pc.fill_null(statistics["licence"], "unknown"),
    )
    sums = named.group_by(["slice", "licence"]).aggregate([("documents", "sum"), ("bytes", "sum")])
    table = Table(title="what stays, by slice and licence")
    table.add_column("slice", overflow="fold")
    table.add_column("licence", overflow="fold")
    table.add_column("documents", justify="right")
    table.add_column("content", justify="right")
    for row in sorted(sums.to_pylist(), key=lambda row: (row["slice"], row["licence"])):
        table.add_row(row["slice"], row["licence"], f"{row['documents_sum']:,}", size(row["bytes_sum"]))
    return table


def print_reasons(reasons: Reasons, console: Console) -> None:
    """Why one document is where it is."""
    for line in reason_lines(reasons):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def reason_lines(reasons: Reasons) -> Iterator[str]:
    """The same, line by line."""
    facts = reasons.facts
    yield f"{reasons.status} in {reasons.dataset}: {facts['path']}"
    yield "  " + ", ".join(f"{name} {value}" for name, value in facts.items() if name != "path" and value)
    verdict = reasons.verdict or {}
    if reasons.status == "dropped":
        limit = "" if verdict["threshold"] is None else f", the threshold {verdict['threshold']:g}"
        yield f"  dropped by the rule: {verdict['title']}"
        yield f"    {verdict['column']} is {verdict['value']}{limit}"
        if reasons.partner is not None:
            yield f"    it lost against {reasons.partner['id']} ({reasons.partner['path']})"
    elif reasons.status == "covered":
        kinds = ", ".join(f"{count} {kind}" for kind, count in verdict["kinds"])
        yield f"  kept as {verdict['new_id']}, with spans covered: {kinds}"
    elif reasons.status == "quarantined":
        yield f"  {verdict['reason']}"
        if verdict["excerpt"]:
            yield f"    it begins: {verdict['excerpt']!r}"
    if reasons.rules:
        yield "  rules, each asked by itself:"
        yield from (f"    {_rule_line(said)}" for said in reasons.rules)
    if reasons.notes:
        yield "  what steps said:"
        yield from (f"    {name}: {_shown(value)}" for name, value in reasons.notes.items())


def _rule_line(said: Said) -> str:
    holds = "holds" if said.holds else "does not hold"
    limit = "" if said.threshold is None else f", threshold {said.threshold:g}"
    mark = "  <- decided" if said.decided else ""
    return f"{said.action} {said.title}: {holds} ({_shown(said.value)}{limit}){mark}"


def _shown(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
        return ", ".join(value) or "none"
    if isinstance(value, list):
        spans = ", ".join(f"{span['kind']} {span['start']}-{span['end']}" for span in value[:8])
        return f"{len(value)} spans: {spans}{', ...' if len(value) > 8 else ''}" if value else "no spans"
    return "unknown" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def print_difference(found: Difference, console: Console, rows: int) -> None:
    """What differs, with at most so many documents of each kind."""
    if found.same:
        console.print(f"the same documents, root {found.root_before}", highlight=False, soft_wrap=True)
        return
    table = Table(title=f"root {found.root_before[:16]} -> {found.root_after[:16]}")
    table.add_column("slice", overflow="fold")
    for head in ("documents", "", "content", ""):
        table.add_column(head, justify="right")
    for line in found.slices:
        table.add_row(
            line.slice,
            f"{line.documents_before:,} -> {line.documents_after:,}",
            f"{line.documents_after - line.documents_before:+,}",
            f"{size(line.bytes_before)} -> {size(line.bytes_after)}",
            f"{line.bytes_after - line.bytes_before:+,}",
        )
    console.print(table)
    _print_rows("removed", [_row_line(row) for row in found.removed], console, rows)
    _print_rows("added", [_row_line(row) for row in found.added], console, rows)
    lines = [
        f"{_row_line(line.before)} -> {line.after.id}: {', '.join(line.fields)}" for line in found.changed
    ]
    _print_rows("changed", lines, console, rows)


def _print_rows(what: str, lines: Sequence[str], console: Console, rows: int) -> None:
    console.print(f"{len(lines):,} {what}", highlight=False)
    for line in lines[:rows]:
        console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
    if len(lines) > rows:
        console.print(f"  ... and {len(lines) - rows:,} more (--rows)", highlight=False)


def _row_line(row: Row) -> str:
    return f"{row.id} {row.path} ({row.slice})" + (f": {row.why}" if row.why else "")


def size(n_bytes: int) -> str:
    """Bytes as people say them.

    >>> size(950), size(83_000_000)
    ('950 B', '83.0 MB')
    """
    for unit, name in _UNITS:
        if n_bytes >= unit:
            return f"{n_bytes / unit:.1f} {name}"
    return f"{n_bytes} B"
