"""A model's card, from lineage: what it is, what it learned from, what was measured of it, and what was not.

    model_card(store, model) --> Markdown, with the front matter that model hubs read

Nothing in a card is typed in by hand but the intended use, and a card without one says so. What it learned
from are the documents of the nearest artifacts above it that list their documents, over edges that are not
held out (`core.lineage_graph`); figures are those of artifacts made from this very model, each with its count
and 95% interval.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow.dataset
import yaml
from sqlalchemy import select

from gyrocompass.core.artifact import Artifact
from gyrocompass.core.errors import BadInput
from gyrocompass.core.lineage import walk
from gyrocompass.core.lineage_graph import HELD_OUT, KEPT, Node
from gyrocompass.core.store import Store
from gyrocompass.core.tables import KnownDocument, ListingRow
from gyrocompass.govern.promote import evaluations_of, measured, scores_of
from gyrocompass.govern.registry import versions
from gyrocompass.measure.intervals import SliceScore, slice_scores
from gyrocompass.measure.ledger import Ledger

_FEW = 100
"""Items below which a figure is said to stand on few."""
UNSTATED = "none"
_LANGUAGE = re.compile(r"(?!none)[a-z]{2,3}(-[A-Za-z]+)?")
"""As hubs name them, which know no programming languages."""


class Learned(NamedTuple):
    """What a model learned from."""

    documents: Mapping[tuple[str, str, str, str], int]
    """By slice, source, licence and language; "none" where a document states none."""
    unknown: tuple[str, ...]
    """Artifacts that it was made from and that this store does not have."""

    def by(self, place: int) -> Counter[str]:
        """Documents by one of the four."""
        found: Counter[str] = Counter()
        for key, count in self.documents.items():
            found[key[place]] += count
        return found


def model_card(store: Store, model_id: str, intended_use: str | None = None) -> str:
    """The card of a model.

    Args:
        store: that has the model and what was made from it.
        model_id: of the artifact.
        intended_use: Markdown, by the people who answer for it.

    Raises:
        BadInput: there is no such artifact, or it is no model.
    """
    model = store.open(model_id, verify=False)
    if model.manifest.kind != "model":
        raise BadInput(f"{model.id} is of the kind {model.manifest.kind}, not a model", where=model.path)
    names = [one for one in versions(store) if one.artifact_id == model.id]
    up = walk(store, model.id).artifact
    assert up is not None
    up = whole(up)
    learned = learned_from(store, up)
    scores = [
        (artifact, slice_scores(Ledger.load(artifact.path / "ledger.parquet")))
        for artifact in scores_of(store, model.id).values()
    ]
    evaluations = evaluations_of(store, model.id)
    calibrations = [
        (artifact, json.loads((artifact.path / "calibration.json").read_text(encoding="utf-8")))
        for artifact in measured(store, model.id, ("calibration",))
    ]
    title = f"{names[-1].name}:{names[-1].version}" if names else model.id
    aliases = "".join(f", `{one.name}@{alias}`" for one in names for alias in one.aliases)
    made = f"made {model.manifest.created_at} by code {model.manifest.code_version}"
    line = _table(("artifact", "by", "objective", "steps", "tokens"), _line(up))
    limits = _limits(model, learned, scores, evaluations, calibrations)
    parts = {
        "Intended use": intended_use or "Nobody has stated one: ask before you rely on it.",
        "How it was made": line,
        "What it learned from": _documents(learned),
        "What was measured": _figures(scores, evaluations, calibrations) or "Nothing.",
        "Limits": "\n".join(f"- {one}" for one in limits),
    }
    body = "".join(f"\n## {name}\n\n{text.strip()}\n" for name, text in parts.items())
    return f"{_front(learned)}\n# {title}\n\nArtifact `{model.id}`{aliases}, {made}.\n{body}"


def whole(node: Node) -> Node:
    """The same tree with the links back in that it leaves out where they stand elsewhere."""
    known = {one.id: one for one in _below(node) if not one.again}
    made: dict[str, Node] = {}

    def filled(one: Node) -> Node:
        if one.id not in made:
            source = known.get(one.id, one)
            made[one.id] = source._replace(links=tuple(map(filled, source.links)), again=False)
        return made[one.id]._replace(role=one.role)

    return filled(node)


def _below(node: Node) -> Iterator[Node]:
    yield node
    for link in node.links:
        yield from _below(link)


def learned_from(store: Store, up: Node) -> Learned:
    """The documents that a model learned from, each counted once."""
    listings: dict[str, Node] = {}
    unknown: set[str] = set()
    waiting = [up]
    while waiting:
        node = waiting.pop()
        if node.kind is None:
            unknown.add(node.id)
        elif node.documents:
            listings[node.id] = node
        else:
            waiting += _learned_links(node)
    slice_and_source: dict[str, tuple[str, str]] = {}
    licence_and_language: dict[str, tuple[str, str]] = {}
    for name, node in listings.items():
        slice_and_source |= _kept(store, name)
        licence_and_language |= _stated(store, node)
    nothing = (UNSTATED, UNSTATED)
    found = Counter(
        (*place, *licence_and_language.get(document, nothing)) for document, place in slice_and_source.items()
    )
    return Learned(found, tuple(sorted(unknown)))


def _learned_links(node: Node) -> list[Node]:
    return [link for link in node.links if not link.role.startswith(HELD_OUT)]


def _kept(store: Store, artifact_id: str) -> dict[str, tuple[str, str]]:
    """Slice and source of the documents that an artifact lists as kept."""
    query = (
        select(ListingRow.document_id, ListingRow.slice, KnownDocument.source)
        .join(KnownDocument, KnownDocument.id == ListingRow.document_id)
        .where(ListingRow.artifact_id == artifact_id, ListingRow.status == KEPT)
    )
    with store.database.read() as connection:
        return {name: (slice_, source) for name, slice_, source in connection.execute(query)}


def _stated(store: Store, node: Node) -> dict[str, tuple[str, str]]:
    """Licence and language by document, from the nearest artifacts that hold the documents themselves."""
    if node.kind is None:
        return {}
    files = sorted(store.open(node.id, verify=False).path.glob("documents*.parquet"))
    if not files:
        return {name: told for link in _learned_links(node) for name, told in _stated(store, link).items()}
    columns = ["id", "licence", "language"]
    table = pyarrow.dataset.dataset(files).to_table(columns=columns)
    ids, licences, languages = (table[column].to_pylist() for column in columns)
    return {
        name: (licence or UNSTATED, language or UNSTATED)
        for name, licence, language in zip(ids, licences, languages, strict=True)
    }


def _front(learned: Learned) -> str:
    """What hubs read: https://huggingface.co/docs/hub/model-cards."""
    licences = sorted(licence for licence in learned.by(2) if licence != UNSTATED)
    about: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["gyrocompass"],
        "language": [name for name in sorted(learned.by(3)) if _LANGUAGE.fullmatch(name)],
    }
    if licences:
        about |= {"license": "other", "license_name": f"data under {', '.join(licences)}"}
    return "---\n" + yaml.safe_dump(about, sort_keys=False, allow_unicode=True).strip() + "\n---\n"


def _line(node: Node) -> Iterator[Sequence[object]]:
    """The model and those before it, the first one first."""
    for link in node.links:
        if link.role in ("model", "imported") and link.kind == "model":
            yield from _line(link)
    objective = node.recipe.get("objective") or ()
    counts = node.counts
    yield (
        f"`{node.id}`",
        node.recipe.get("kind", ""),
        " + ".join(one if isinstance(one, str) else _weighted(one) for one in objective),
        _number(counts.get("steps")),
        _number(counts.get("tokens")),
    )


def _weighted(objective: Mapping[str, Any]) -> str:
    """An objective with its numbers."""
    said = []
    for name, told in objective.items():
        numbers = [
            f"{key} {value:g}" for key, value in (told or {}).items() if isinstance(value, int | float)
        ]
        said.append(f"{name} ({', '.join(numbers)})" if numbers else name)
    return ", ".join(said)


def _documents(learned: Learned) -> str:
    if not learned.documents:
        return "No document: it was made from none that this store knows."
    rows = [(*key, f"{count:,}") for key, count in sorted(learned.documents.items())]
    shown = _table(("slice", "source", "licence", "language", "documents"), rows)
    missing = ", ".join(f"`{name}`" for name in learned.unknown)
    return shown + (f"\n\nNot known here: {missing}." if missing else "")


def _figures(
    scores: Sequence[tuple[Artifact, Sequence[SliceScore]]],
    evaluations: Sequence[tuple[Artifact, Mapping[str, Any]]],
    calibrations: Sequence[tuple[Artifact, Sequence[Mapping[str, Any]]]],
) -> str:
    parts = []
    for artifact, lines in scores:
        rows = [
            (line.slice, f"{line.tokens:,}", f"{line.documents:,}",
             _between(line.nats_per_token, line.nats_per_token_low, line.nats_per_token_high),
             _between(line.bits_per_byte, line.bits_per_byte_low, line.bits_per_byte_high))
            for line in lines
        ]  # fmt: skip
        columns = ("slice", "tokens", "documents", "nats per token", "bits per byte")
        parts.append(f"Likelihood of held-out documents (`{artifact.id}`):\n\n" + _table(columns, rows))
    for artifact, told in evaluations:
        figures = [
            (task["name"], line["name"], _number(line["size"]), _of(line))
            for task in told["tasks"]
            for line in task["figures"]
            if line["slice"] == "total"
        ]
        if figures:
            head = ("task", "figure", "items", "value")
            parts.append(f"Tasks (`{artifact.id}`):\n\n" + _table(head, figures))
        parts += [
            f"{row['read']:,} of {row['items']:,} items of {row['task']} may have been read."
            for row in told.get("contamination", ())
        ]
        if canaries := told.get("canaries", ()):
            worst = max(row["bits"] for row in canaries)
            parts.append(f"The most exposed of {len(canaries)} planted canaries has {worst:.2f} bits.")
    for artifact, entries in calibrations:
        errors = []
        for entry in entries:
            sides = [entry.get(side, {}).get("slices", {}).get("total") for side in ("before", "after")]
            shown = ["" if side is None else _of(side | {"value": side["debiased"]}) for side in sides]
            errors.append((entry["level"], entry["signal"], _number(entry["outcomes"]), *shown))
        signals = ("level", "signal", "outcomes", "error before", "error after")
        parts.append(f"Debiased calibration error (`{artifact.id}`):\n\n" + _table(signals, errors))
    return "\n\n".join(parts)


def _limits(
    model: Artifact,
    learned: Learned,
    scores: Sequence[tuple[Artifact, Sequence[SliceScore]]],
    evaluations: Sequence[tuple[Artifact, Mapping[str, Any]]],
    calibrations: Sequence[tuple[Artifact, Sequence[Mapping[str, Any]]]],
) -> Iterator[str]:
    """What follows from what it learned from and from what was measured, or was not."""
    config = model.path / "config.json"
    told = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    if length := told.get("max_position_embeddings"):
        yield f"It reads at most {length:,} tokens at once."
    languages = [name for name in learned.by(3) if name != UNSTATED]
    if languages:
        named = ", ".join(sorted(languages))
        yield f"It learned from documents in {named}; of other languages nothing is known."
    total = sum(learned.documents.values())
    if unstated := learned.by(2)[UNSTATED]:
        yield f"{unstated:,} of its {total:,} documents state no licence."
    if learned.unknown:
        yield "It was made from artifacts that are not in this store: what these learned from is not known."
    own = {name for name, count in learned.by(0).items() if count}
    seen = {line.slice for _, lines in scores for line in lines}
    if scores and (unseen := sorted(own - seen)):
        yield f"Its likelihood was not measured on {', '.join(unseen)}."
    if not scores:
        yield "Its likelihood was measured on no held-out document."
    few = sorted(
        {task["name"] for _, told in evaluations for task in told["tasks"] for line in task["figures"]
         if line["slice"] == "total" and line["size"] < _FEW}
    )  # fmt: skip
    if few:
        yield f"Fewer than {_FEW} items stand behind {', '.join(few)}."
    if not any(told["tasks"] for _, told in evaluations):
        yield "It was measured on no task."
    if not any(told.get("contamination") for _, told in evaluations):
        yield "Nobody has looked for test items in what it learned from."
    if not any(told.get("canaries") for _, told in evaluations):
        yield "What it knows by heart was not measured by canaries."
    levels = {entry["level"] for _, entries in calibrations for entry in entries if "after" in entry}
    if missing := [level for level in ("token", "choice", "answer") if level not in levels]:
        yield f"Its confidence is not calibrated at the level of {', '.join(missing)}."


def _between(value: float | None, low: float | None, high: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" + ("" if low is None or high is None else f" ({low:.4f} to {high:.4f})")


def _of(line: Mapping[str, Any]) -> str:
    return _between(line["value"], line["low"], line["high"])


def _number(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines
    )
