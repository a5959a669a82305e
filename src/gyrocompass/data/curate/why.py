"""Why a document is in a data set or is not: the verdict, what every step said, what every rule said.

    why(store, dataset, name) --> Reasons

The document is looked for among all that was read, dropped ones included; rules are asked again for this one
document, so that one sees which others would have dropped it too.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gyrocompass.core.artifact import Artifact
from gyrocompass.core.errors import BadInput, nearest
from gyrocompass.core.store import Store
from gyrocompass.data.curate.config import BuildConfig, build_from
from gyrocompass.data.curate.corpus import Corpus
from gyrocompass.data.curate.dataset import COVERED, LEDGER
from gyrocompass.data.curate.decide import FAILURES
from gyrocompass.data.curate.rules import Condition
from gyrocompass.data.document import QUARANTINED

_SHOWN = 8
_COMPARED = 2000
_FACTS = ["id", "path", "source", "slice", "licence", "language", "n_bytes", "content_hash"]


class Said(NamedTuple):
    """What one rule says of the document, asked by itself."""

    title: str
    action: str
    holds: bool
    value: Any
    threshold: float | None
    decided: bool
    """Whether it is the one that decided."""


class Reasons(NamedTuple):
    """All there is to say of one document in one data set."""

    dataset: str
    status: str
    """kept, covered, dropped or quarantined."""
    facts: dict[str, Any]
    """Its id, path, source, slice, ...; of a quarantined record what is known."""
    verdict: dict[str, Any] | None
    """Its row of the ledger, or of what was covered, or of the quarantine."""
    notes: dict[str, Any]
    """What steps said, by `<step>.<column>`."""
    rules: tuple[Said, ...]
    partner: dict[str, Any] | None = None
    """The document it lost against."""


def why(store: Store, dataset: Artifact, name: str) -> Reasons:
    """Ask about one document.

    Args:
        store: where the data set's corpus and annotations are.
        dataset: see `open_dataset`.
        name: a document's id or a beginning of it (also that of what it became), its path or the end of it.

    Raises:
        BadInput: nothing, or more than one thing, has this name; or what it needs was deleted.
    """
    config = build_from(dataset.manifest.recipe, dataset.id)
    parents = {role: store.open(parent, verify=False) for role, parent in dataset.manifest.parents.items()}
    annotations = {
        role.removeprefix("annotations."): parent.path
        for role, parent in parents.items()
        if role.startswith("annotations.")
    }
    corpus = Corpus(parents["corpus"].path, annotations)
    found = _matching(corpus, dataset, name)
    if isinstance(found, dict):
        return Reasons(dataset.id, "quarantined", _quarantine_facts(found), found, {}, ())
    row = corpus.take([found], [*_FACTS, *config.known]).to_pylist()[0]
    facts = {column: row[column] for column in _FACTS}
    notes = {column: row[column] for column in config.known}
    dropped = _row(dataset.path / LEDGER, found)
    covered = _row(dataset.path / COVERED, found)
    failed = {label: _row(folder / FAILURES, found) for label, folder in annotations.items()}
    notes |= {f"{label} failed": entry["reason"] for label, entry in failed.items() if entry}
    status = "dropped" if dropped else "covered" if covered else "kept"
    partner = None
    if dropped and dropped["partner"]:
        partner = corpus.take([dropped["partner"]], _FACTS).to_pylist()[0]
    asked = corpus.take([found], list(dict.fromkeys(["id", "slice", *_columns(config)])))
    return Reasons(
        dataset.id,
        status,
        facts,
        dropped or covered,
        notes,
        tuple(_said(config, asked, dropped)),
        partner,
    )


def _columns(config: BuildConfig) -> list[str]:
    return [column for rule in config.rules for column in rule.columns(config.known)]


def _said(config: BuildConfig, row: pa.RecordBatch, dropped: Mapping[str, Any] | None) -> Iterator[Said]:
    """What every rule about one document says of it; `keep_one` speaks through the ledger alone."""
    decided = None if dropped is None else dropped["rule"]
    for number, rule in enumerate(config.rules):
        chosen = rule.selected
        if not isinstance(chosen, Condition):
            value = row[chosen.column][0].as_py()
            shown = len(value or ()) if isinstance(value, list) else value
            holds = number == decided if rule.keep_one is not None else bool(value)
            yield Said(rule.title, rule.action, holds, shown, None, number == decided)
            continue
        hits = chosen.holds(row)
        threshold = float(hits.thresholds[0])
        shown_threshold = None if threshold != threshold else threshold
        holds = bool(hits.mask[0])
        if rule.keep is not None and holds and decided is None:
            decided = number
        value = hits.values[0].as_py()
        yield Said(rule.title, rule.action, holds, value, shown_threshold, number == decided)


def _matching(corpus: Corpus, dataset: Artifact, name: str) -> str | dict[str, Any]:
    """The id of the one document that a name means, or a quarantined record."""
    exact: dict[str, str] = {}
    alike: dict[str, str] = {}
    for batch in corpus.batches(["id", "path"]):
        for document_id, path in zip(batch["id"].to_pylist(), batch["path"].to_pylist(), strict=True):
            if name in (document_id, path):
                exact[document_id] = path
            elif document_id.startswith(name) or path.endswith(f"/{name}"):
                alike[document_id] = path
    became = pq.read_table(dataset.path / COVERED, columns=["id", "new_id", "path"])
    for row in became.filter(pc.starts_with(became["new_id"], name)).to_pylist():
        (exact if row["new_id"] == name else alike)[row["id"]] = row["path"]
    found = exact or alike
    if len(found) == 1:
        return next(iter(found))
    if found:
        shown = ", ".join(f"{document_id} ({path})" for document_id, path in [*found.items()][:_SHOWN])
        more = ", ..." if len(found) > _SHOWN else ""
        raise BadInput(f"{name!r} may be any of: {shown}{more}", where=dataset.id, fix="write more of it")
    for row in pq.read_table(dataset.path / QUARANTINED).to_pylist():
        places = (row["path"], f"{row['path']}:{row['line']}")
        if name in (*places, row["document_id"]) or any(place.endswith(f"/{name}") for place in places):
            return dict(row)
    paths = (path for batch in corpus.batches(["path"]) for path in batch["path"].to_pylist())
    best = nearest(name, itertools.islice(paths, _COMPARED))
    hint = f"; did you mean {best}?" if best else ""
    raise BadInput(
        f"no document of this name was read: {name!r}{hint}",
        where=dataset.id,
        fix="give its id or its path; what was left out by an opt-out or a limit was not read",
    )


def _quarantine_facts(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"path": row["path"], "source": row["source"], "line": row["line"]}


def _row(path: Path, document_id: str) -> dict[str, Any] | None:
    rows = pq.read_table(path, filters=[("id", "=", document_id)]).to_pylist()
    return dict(rows[0]) if rows else None
