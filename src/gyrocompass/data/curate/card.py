"""The data card of a data set: what is in it, what is not and why, and what was found in what is.

    data set, its corpus, its annotations --read_card--> DataCard
    DataCard --card_markdown--> Markdown       (croissant, training_summary: other forms of the same)

Everything is counted from the artifact's own tables, nothing is asked again of a text. Counts by slice,
source, licence and language are of documents as they were kept, after masks and pseudonyms.

Steps are told by what they say, not by their names: columns of spans are findings by kind. Findings of steps
that look for personal data, secrets or contamination are told apart by the step's name, as a person reads it.

Tokens are those of a data set that was tokenised: token artifacts made from this data set, each token of a
document once. What was not tokenised has none, which is not 0.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gyrocompass.core.artifact import Artifact
from gyrocompass.core.store import Store
from gyrocompass.data.curate.canary_figures import CanaryFigure, canary_figures
from gyrocompass.data.curate.config import BuildConfig, build_from
from gyrocompass.data.curate.corpus import Corpus
from gyrocompass.data.curate.dataset import COVERED, LEDGER, STATISTICS, document_batches
from gyrocompass.data.curate.reading import SKIPPED
from gyrocompass.data.curate.step import SPANS
from gyrocompass.data.curate.versions import read_facts
from gyrocompass.data.document import QUARANTINED

GROUPINGS = ("slice", "language", "licence", "source")
FOUND = {"language": "label", "licences": "expression"}
"""Steps that find out what sources do not say, and the columns they say it in."""
UNKNOWN = "unknown"
"""How a licence or a language that nobody knows is called."""

TOPICS: Mapping[str, tuple[str, ...]] = {
    "personal": ("personal", "pii", "private", "names"),
    "secrets": ("secret",),
    "contamination": ("contamin", "decontam", "benchmark"),
}
"""What steps look for, by the beginnings of words in their names."""


class Counted(NamedTuple):
    """Some of the documents."""

    name: str
    documents: int
    bytes: int
    tokens: int | None
    """None where they were not tokenised."""


class Dropped(NamedTuple):
    """What one rule took."""

    title: str
    column: str
    documents: int
    bytes: int
    example: str
    """The path of the first."""


class Lost(NamedTuple):
    """Records that could not be read, for one reason."""

    reason: str
    records: int
    bytes: int
    """As far as they are known."""
    example: str
    """Where the first stands: path, line or byte."""


class Finding(NamedTuple):
    """Spans of one kind that one step found."""

    step: str
    topic: str
    """A key of `TOPICS`, or "" for all else."""
    kind: str
    documents: int
    """Of all that were read."""
    spans: int
    kept_documents: int
    """Of those that stay."""
    kept_spans: int
    covered_spans: int
    """Of these: masked or under a pseudonym."""


class DataCard(NamedTuple):
    """What there is to say of a data set."""

    name: str
    description: str
    dataset: str
    """The artifact's id."""
    root: str
    """The Merkle root over its documents, 64 hex digits."""
    created_at: str
    code_version: str
    total: Counted
    by: Mapping[str, tuple[Counted, ...]]
    """For each of `GROUPINGS`, and for what each step of `FOUND` says, the largest first."""
    read_documents: int
    read_bytes: int
    dropped: tuple[Dropped, ...]
    lost: tuple[Lost, ...]
    skipped: Mapping[str, int]
    """Records left out by rule while reading, by reason."""
    findings: tuple[Finding, ...]
    canaries: tuple[CanaryFigure, ...]
    """What the finders of personal data and secrets find of planted texts, by slice."""
    sources: tuple[Mapping[str, Any], ...]
    """As the build lists them."""
    steps: tuple[str, ...]
    rules: tuple[str, ...]

    @property
    def lost_share(self) -> float:
        """Of all records: those that could not be read."""
        lost = sum(each.records for each in self.lost)
        return lost / (lost + self.read_documents) if lost else 0.0


class Parts(NamedTuple):
    """A data set with what it was made from."""

    dataset: Artifact
    corpus_artifact: Artifact
    corpus: Corpus
    """With its annotations."""
    config: BuildConfig


def open_parts(store: Store, dataset: Artifact) -> Parts:
    """A data set's corpus and annotations.

    Raises:
        BadInput: one of them is not in the store any more.
    """
    parents = {role: store.open(parent, verify=False) for role, parent in dataset.manifest.parents.items()}
    annotations = {
        role.removeprefix("annotations."): parent.path
        for role, parent in parents.items()
        if role.startswith("annotations.")
    }
    corpus = Corpus(parents["corpus"].path, annotations)
    return Parts(dataset, parents["corpus"], corpus, build_from(dataset.manifest.recipe, dataset.id))


def read_card(store: Store, parts: Parts) -> DataCard:
    """Count it all."""
    dataset, corpus, _, config = parts
    facts, manifest = read_facts(dataset.path), dataset.manifest
    tokens = document_tokens(store, dataset)
    kept = kept_ids(dataset.path)
    statistics = pq.read_table(dataset.path / STATISTICS)
    token_sums = _token_sums(dataset.path, tokens)
    counts = manifest.counts
    total = Counted(
        "total", int(counts["documents"]), int(counts["bytes"]), sum(tokens.values()) if tokens else None
    )
    return DataCard(
        name=facts["name"],
        description=config.description,
        dataset=dataset.id,
        root=facts["root"],
        created_at=manifest.created_at,
        code_version=manifest.code_version,
        total=total,
        by={name: _grouped(statistics, name, token_sums) for name in GROUPINGS} | _found(parts, kept, tokens),
        read_documents=int(corpus.manifest.counts["documents"]),
        read_bytes=int(corpus.manifest.counts["bytes"]),
        dropped=tuple(_dropped(dataset.path)),
        lost=tuple(_lost(dataset.path)),
        skipped=json.loads((corpus.path / SKIPPED).read_text("utf-8")),
        findings=tuple(_findings(parts, kept)),
        canaries=tuple(canary_figures(config.steps)),
        sources=tuple(source.model_dump(mode="json", exclude_none=True) for source in config.sources),
        steps=tuple(named.label for named in config.steps),
        rules=tuple(f"{rule.action}: {rule.title}" for rule in config.rules),
    )


# --- counts ---


def document_tokens(store: Store, dataset: Artifact) -> dict[str, int]:
    """Tokens of each document of a data set, from the token artifacts that were made from it."""
    tokens: Counter[str] = Counter()
    for folder in store.folders("tokens"):
        artifact = store.open(folder.name, verify=False)
        if dataset.id not in _ancestors(store, artifact):
            continue
        for path in sorted(artifact.path.glob("tokens-*.parquet")):
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(columns=["document_id", "ids"]):
                    lengths = pc.list_value_length(batch["ids"]).to_pylist()
                    for name, length in zip(batch["document_id"].to_pylist(), lengths, strict=True):
                        tokens[name.partition("#")[0]] += length
    return dict(tokens)


def _ancestors(store: Store, artifact: Artifact) -> set[str]:
    """All that an artifact was made from, as far as the store holds it."""
    found: set[str] = set()
    waiting = list(artifact.manifest.parents.values())
    here = {summary.id for summary in store.artifacts()}
    while waiting:
        parent = waiting.pop()
        if parent not in found:
            found.add(parent)
            if parent in here:
                waiting += store.open(parent, verify=False).manifest.parents.values()
    return found


def _token_sums(folder: Path, tokens: Mapping[str, int]) -> Mapping[str, Counter[str]]:
    """Tokens by value, for each grouping; empty where nothing was tokenised."""
    sums: dict[str, Counter[str]] = {name: Counter() for name in GROUPINGS}
    if tokens:
        for batch in document_batches(folder, ["id", *GROUPINGS]):
            for row in batch.to_pylist():
                for name in GROUPINGS:
                    sums[name][row[name] or UNKNOWN] += tokens.get(row["id"], 0)
    return sums


def _grouped(statistics: pa.Table, name: str, tokens: Mapping[str, Counter[str]]) -> tuple[Counted, ...]:
    documents: Counter[str] = Counter()
    n_bytes: Counter[str] = Counter()
    for row in statistics.select([name, "documents", "bytes"]).to_pylist():
        documents[row[name] or UNKNOWN] += row["documents"]
        n_bytes[row[name] or UNKNOWN] += row["bytes"]
    known = bool(tokens[name])
    counted = (
        Counted(value, documents[value], n_bytes[value], tokens[name][value] if known else None)
        for value in documents
    )
    return tuple(sorted(counted, key=lambda each: (-each.bytes, each.name)))


def _dropped(folder: Path) -> Iterator[Dropped]:
    """What each rule took, in the order of the rules."""
    table = pq.read_table(folder / LEDGER, columns=["rule", "title", "column", "n_bytes", "path"])
    sums: dict[tuple[int, str, str], list[Any]] = {}
    for row in table.to_pylist():
        taken = sums.setdefault((row["rule"], row["title"], row["column"]), [0, 0, row["path"]])
        taken[0] += 1
        taken[1] += row["n_bytes"]
    for (_, title, column), (documents, n_bytes, example) in sorted(sums.items()):
        yield Dropped(title, column, documents, n_bytes, example)


def _lost(folder: Path) -> Iterator[Lost]:
    """What could not be read, the most frequent reason first; numbers in reasons do not tell them apart."""
    records: Counter[str] = Counter()
    n_bytes: Counter[str] = Counter()
    example: dict[str, str] = {}
    for row in pq.read_table(folder / QUARANTINED).to_pylist():
        reason = row["reason"]
        records[reason] += 1
        n_bytes[reason] += row.get("n_bytes") or 0
        example.setdefault(reason, record_place(row))
    for reason, count in records.most_common():
        yield Lost(reason, count, n_bytes[reason], example[reason])


def record_place(row: Mapping[str, Any]) -> str:
    """Where a quarantined record stands."""
    place = str(row["path"])
    if row["line"] is not None:
        place += f":{row['line']}"
    return place if row.get("offset") is None else f"{place}, byte {row['offset']:,}"


# --- findings ---


def span_columns(config: BuildConfig) -> tuple[str, ...]:
    """The columns of spans, by `<step>.<column>`."""
    return tuple(name for name, kind in config.known.items() if kind == SPANS)


def topic_of(step: str) -> str:
    """What a step looks for, by its name.

    >>> topic_of("personal"), topic_of("secrets"), topic_of("repeated_passages")
    ('personal', 'secrets', '')
    """
    words = step.lower().split("_")
    return next(
        (topic for topic, starts in TOPICS.items() if any(word.startswith(starts) for word in words)), ""
    )


def kept_ids(folder: Path) -> dict[str, str]:
    """The documents of the corpus that stay, each with its id in the data set: a new one if it is covered."""
    covered = pq.read_table(folder / COVERED, columns=["id", "new_id"])
    before = dict(zip(covered["new_id"].to_pylist(), covered["id"].to_pylist(), strict=True))
    return {
        before.get(name, name): name
        for batch in document_batches(folder, ["id"])
        for name in batch["id"].to_pylist()
    }


def _found(
    parts: Parts, kept: Mapping[str, str], tokens: Mapping[str, int]
) -> dict[str, tuple[Counted, ...]]:
    """What steps say of the documents that stay, with their bytes before anything in them was covered."""
    columns = {
        f"{named.step.name}, as {named.label} finds it": f"{named.label}.{FOUND[named.step.name]}"
        for named in parts.config.steps
        if named.step.name in FOUND
    }
    sums: dict[str, defaultdict[str, Counter[str]]] = {name: defaultdict(Counter) for name in columns}
    if columns:
        for batch in parts.corpus.batches(["id", "n_bytes", *columns.values()]):
            for row in batch.to_pylist():
                if row["id"] in kept:
                    size = {"documents": 1, "bytes": row["n_bytes"], "tokens": tokens.get(kept[row["id"]], 0)}
                    for name, column in columns.items():
                        sums[name][row[column] or UNKNOWN].update(size)
    return {
        name: tuple(
            Counted(value, each["documents"], each["bytes"], each["tokens"] if tokens else None)
            for value, each in sorted(values.items(), key=lambda item: (-item[1]["bytes"], item[0]))
        )
        for name, values in sums.items()
    }


def _findings(parts: Parts, kept: Mapping[str, str]) -> Iterator[Finding]:
    columns = span_columns(parts.config)
    if not columns:
        return
    sums: defaultdict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for batch in parts.corpus.batches(["id", *columns]):
        stays = [name in kept for name in batch["id"].to_pylist()]
        for column in columns:
            step = column.partition(".")[0]
            for row, kinds in _kinds(batch[column], topic_of(step)):
                for kind, count in kinds.items():
                    found = sums[step, kind]
                    found.update({"documents": 1, "spans": count})
                    if stays[row]:
                        found.update({"kept_documents": 1, "kept_spans": count})
    covered = _covered_kinds(parts.dataset.path)
    for (step, kind), found in sorted(sums.items()):
        yield Finding(
            step,
            topic_of(step),
            kind,
            found["documents"],
            found["spans"],
            found["kept_documents"],
            found["kept_spans"],
            min(covered[kind], found["kept_spans"]),
        )


def _kinds(column: pa.Array, topic: str) -> Iterator[tuple[int, Counter[str]]]:
    """For each row that has spans: how many of each kind; of benchmarks, without the number of the item."""
    filled = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
    for row in filled.nonzero()[0].tolist():
        kinds = [span["kind"] for span in column[row].as_py()]
        yield row, Counter(kind.partition("#")[0] if topic == "contamination" else kind for kind in kinds)


def _covered_kinds(folder: Path) -> Counter[str]:
    covered: Counter[str] = Counter()
    for row in pq.read_table(folder / COVERED, columns=["kinds"]).to_pylist():
        covered.update(dict(row["kinds"]))
    return covered


# --- Markdown ---


def card_markdown(card: DataCard) -> str:
    """The card as Markdown."""
    lines = [f"# {escaped(card.name)}", ""]
    if card.description:
        lines += [escaped(card.description), ""]
    lines += [
        f"Data set `{card.dataset}`, made {card.created_at} by code {card.code_version}.",
        f"Merkle root over its documents: `{card.root}`.",
        "",
        "## What is in it",
        "",
        f"{_amount(card.total)}, of {card.read_documents:,} documents ({card.read_bytes:,} bytes) read.",
        "",
    ]
    for name in card.by:
        lines += [f"### By {name}", "", *counted_table(name, card.by[name], card.total), ""]
    lines += ["## What is not in it, and why", ""]
    lines += _dropped_lines(card)
    lines += ["## What was found in it", ""]
    for topic, heading in (
        ("personal", "Personal data"),
        ("secrets", "Secrets"),
        ("contamination", "Contamination with benchmarks"),
        ("", "Other spans"),
    ):
        lines += [f"### {heading}", "", *findings_lines(card, topic), ""]
    if card.canaries:
        lines += ["### How much the finders find", "", *canary_lines(card), ""]
    lines += ["## How it was made", "", "Sources, in order:", ""]
    lines += [f"- {escaped(_source_line(source))}" for source in card.sources]
    lines += ["", f"Steps: {', '.join(card.steps) or 'none'}.", "", "Rules, in order:", ""]
    lines += [f"- {escaped(rule)}" for rule in card.rules] or ["- none"]
    return "\n".join(lines) + "\n"


def _dropped_lines(card: DataCard) -> list[str]:
    rows = [(each.title, f"{each.documents:,}", f"{each.bytes:,}", each.example) for each in card.dropped]
    lines = (
        markdown_table(("rule", "documents", "bytes", "the first"), rows) if rows else ["No rule took any."]
    )
    lines += ["", f"Could not be read: {card.lost_share:.2%} of all records.", ""]
    lost = [(each.reason, f"{each.records:,}", f"{each.bytes:,}", each.example) for each in card.lost]
    lines += [*markdown_table(("reason", "records", "known bytes", "the first"), lost), ""] if lost else []
    left_out = [(reason, f"{count:,}") for reason, count in sorted(card.skipped.items())]
    lines += (
        [*markdown_table(("left out by rule while reading", "records"), left_out), ""] if left_out else []
    )
    return lines


def findings_lines(card: DataCard, topic: str) -> list[str]:
    """The findings of a topic as Markdown."""
    looked = [step for step in card.steps if topic_of(step) == topic]
    found = [each for each in card.findings if each.topic == topic]
    if not found:
        nothing = (
            f"Looked for by {', '.join(looked)}; nothing was found." if looked else "No step looked for it."
        )
        return [nothing if topic else "None."]
    heads = ("step", "kind", "documents read", "spans", "documents kept", "spans in them", "of these covered")
    rows = [
        (each.step, each.kind, *(f"{number:,}" for number in each[3:]))
        for each in found
    ]  # fmt: skip
    return markdown_table(heads, rows)


def canary_lines(card: DataCard) -> list[str]:
    """Recall and precision on planted texts as Markdown."""
    heads = ("step", "planted slice", "planted values", "recall", "precision", "found least", "its recall")
    rows = [
        (
            each.step,
            each.slice,
            f"{each.planted:,}",
            f"{each.recall:.3f}",
            f"{each.precision:.3f}",
            each.worst_kind,
            f"{each.worst_recall:.3f}",
        )
        for each in card.canaries
    ]
    said = "Drawn texts with planted values and decoys, looked through with this build's options."
    return [said, "", *markdown_table(heads, rows)]


def counted_table(name: str, rows: Iterable[Counted], total: Counted) -> list[str]:
    """Counts as a Markdown table, with their share of all bytes."""
    with_tokens = total.tokens is not None
    heads = (name, "documents", "bytes", "share of bytes", *(["tokens"] if with_tokens else []))
    cells = [
        (
            each.name,
            f"{each.documents:,}",
            f"{each.bytes:,}",
            f"{each.bytes / max(total.bytes, 1):.1%}",
            *([f"{each.tokens or 0:,}"] if with_tokens else []),
        )
        for each in (*rows, total)
    ]
    return markdown_table(heads, cells)


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table: text to the left, numbers to the right."""
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    return lines + [f"| {' | '.join(map(escaped, row))} |" for row in rows]


def escaped(text: str) -> str:
    r"""A text of the data on one line of Markdown, where it means nothing but itself.

    >>> escaped("a|b <script>\n`x`")
    'a\\|b &lt;script&gt; \\`x\\`'
    """
    line = " ".join(text.split())
    for character in "\\`*_[]|#":
        line = line.replace(character, f"\\{character}")
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _amount(counted: Counted) -> str:
    tokens = "" if counted.tokens is None else f", {counted.tokens:,} tokens"
    return f"{counted.documents:,} documents, {counted.bytes:,} bytes{tokens}"


def _source_line(source: Mapping[str, Any]) -> str:
    ((kind, options),) = source.items()
    said = ", ".join(
        f"{name} {value}"
        for name, value in options.items()
        if value not in ([], {}, None) and name != "limits"
    )
    return f"{kind}: {said}" if said else kind
