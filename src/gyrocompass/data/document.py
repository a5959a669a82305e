"""The document: a text, a conversation, a prompt with its completion or with two to compare, and its origin.

    reader --> Document | Quarantined | Skipped --write_records--> Parquet

A document's identity is computed from its content: `content_hash` covers what is learned from, `id` adds
source and path, so that two copies of a file are two documents with one hash. A record that cannot be used
becomes `Quarantined` with its file, line and reason; one that is left out by rule (an empty file, a limit)
becomes `Skipped`. Nothing is dropped without one of the two.

Left out on purpose: free-form metadata. What a later step needs is a field with a type, or a number by name
among the labels, which objectives read.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from gyrocompass.core.errors import BadInput

Kind = Literal["text", "chat", "completion", "preference"]
Role = Literal["system", "user", "assistant", "tool"]

DOCUMENTS = "documents.parquet"
QUARANTINED = "quarantined.parquet"

EXCERPT_LENGTH = 160
"""Characters of a quarantined record that are kept."""

_ROW_GROUP_BYTES = 8 * 2**20


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str
    content: str


class Step(NamedTuple):
    """One step of an answer that was judged step by step."""

    end: int
    """Where it ends in the answer, in characters."""
    reward: float | None
    """1 right, 0 wrong, or between; None where nobody has said."""


class Evidence(NamedTuple):
    """Something that says under which licence a document is; what it amounts to is for others to weigh."""

    kind: str
    """`header` (SPDX line of the text), `file` (a licence file above it), `copyright` (its package's, DEP-5),
    `link` (rel="license" of a page), or `record` (a field beside it)."""
    where: str
    """The file, and the line or paragraph in it."""
    says: str
    """Its own words, or the start of them: an SPDX expression, a short name, a URL, a first line."""


class Repair(NamedTuple):
    """A place of a text that is not what the file's bytes say as UTF-8."""

    kind: str
    """`charset` (decoded from another one), `mojibake` (decoded wrongly by somebody before), `control`."""
    start: int
    end: int
    """In characters of the text."""
    detail: str
    """What was done: `windows-1252`, `latin-1 > utf-8`."""


class Provenance(NamedTuple):
    """What was seen and done where a document's bytes were found."""

    sha256: str
    """Of the bytes it was made from: a file, a line, a page's body, the texts of a row; 64 hex digits."""
    evidence: tuple[Evidence, ...] = ()
    repairs: tuple[Repair, ...] = ()


@dataclass(frozen=True)
class Document:
    """One document. Which content fields are filled depends on `kind`.

    Args:
        kind: "text" (`text`), "chat" (`messages`), "completion" (`prompt`, and `text` as what follows it), or
            "preference" (`prompt` or `messages`, and after it `text`, the chosen answer, and `rejected`; with
            `gold`, a third answer that is to be imitated).
        path: the file, with the record's line or name after it: `notes/a.md`, `chats.jsonl:12`.
        source: the name of the collection it belongs to.
        slice: the part of the data that numbers are reported for.
        licence: SPDX identifier, or None where it is not known.
        language: "python", "en", ..., or None where it is not known.
        origin_ids: the documents it was derived from.
        weight: multiplies the weight of each of its tokens; above 0.
        labels: what labels say of it as numbers, by name: `margin`, `desirable`, `score`, `relevance`, ...
        steps: the steps of its answer, which together are all of it.
        time: when it was written, as the source itself says it, in UTC; a file system's times say nothing.
        file_hash: sha256 (64 hex digits) of the file it was read from, where that is known; of an archive for
            what lies in one.
        provenance: what raw files say about it; None where it comes from a data set.
        tests: Python texts that code in its answer should pass, for the reward `unit_tests`.
        unit: documents that follow each other under one name are read together; a preference is a unit of
            its own.
        group: documents of one group stay on one side of a split; None means that of its unit, or of its own
            content where it has none.

    >>> document = Document(kind="text", text="x = 1", path="a.py", source="files", slice="code")
    >>> document.id, document.n_bytes
    ('bbb6f23634801d55', 5)
    """

    kind: Kind
    path: str
    source: str
    slice: str
    text: str = ""
    prompt: str = ""
    rejected: str = ""
    gold: str = ""
    messages: tuple[Message, ...] = ()
    licence: str | None = None
    language: str | None = None
    origin_ids: tuple[str, ...] = ()
    weight: float = 1.0
    group: str | None = None
    unit: str | None = None
    labels: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    steps: tuple[Step, ...] = ()
    time: datetime.datetime | None = None
    file_hash: str | None = None
    provenance: Provenance | None = None
    tests: tuple[str, ...] = ()

    @cached_property
    def content_hash(self) -> str:
        """sha256 (64 hex digits) of the content: of the text itself, or of canonical JSON for other kinds."""
        match self.kind:
            case "text":
                content = self.text
            case "completion":
                content = json.dumps([self.prompt, self.text], ensure_ascii=False)
            case "chat":
                content = json.dumps(self.messages, ensure_ascii=False)
            case "preference":
                answers = [self.prompt, self.messages, self.text, self.rejected, *filter(None, [self.gold])]
                content = json.dumps(answers, ensure_ascii=False)
        if self.labels:
            content += json.dumps(dict(self.labels), sort_keys=True)
        if self.steps:
            content += json.dumps(self.steps)
        if self.tests:
            content += json.dumps(self.tests)
        return hashlib.sha256(content.encode()).hexdigest()

    @cached_property
    def id(self) -> str:
        """16 hex digits of sha256 over source, path and content hash."""
        identity = json.dumps([self.source, self.path, self.content_hash], ensure_ascii=False)
        return hashlib.sha256(identity.encode()).hexdigest()[:16]

    @property
    def texts(self) -> tuple[str, ...]:
        """All it says, part by part: what a tokenizer is trained on."""
        match self.kind:
            case "text":
                return (self.text,)
            case "completion":
                return (self.prompt, self.text)
            case "chat":
                return tuple(message.content for message in self.messages)
            case "preference":
                asked = tuple(message.content for message in self.messages)
                return (self.prompt, *asked, self.text, self.rejected, *filter(None, [self.gold]))

    @cached_property
    def n_bytes(self) -> int:
        """UTF-8 bytes of the content; roles and template text are not counted."""
        return sum(len(text.encode()) for text in self.texts)

    @property
    def split_key(self) -> str:
        """What decides its side of a split: its group, else its unit, else its content hash."""
        return self.group or self.unit or self.content_hash

    @property
    def is_judged(self) -> bool:
        """Whether its answer is judged: by a preference, labels, or its steps, or beside others of a unit."""
        return self.kind == "preference" or self.unit is not None or bool(self.labels or self.steps)


class Quarantined(NamedTuple):
    """A record that cannot be used."""

    path: str
    line: int | None
    """Counted from 1; None where the format has no lines."""
    reason: str
    excerpt: str = ""
    """The start of what was read."""
    source: str = ""
    document_id: str | None = None
    """Where it had already become a document."""
    offset: int | None = None
    """The byte it begins at, or where reading had to stop, in the file as it is unpacked."""
    n_bytes: int | None = None
    """How much is lost with it, where that is known."""


class Skipped(NamedTuple):
    """A file or record that is well formed and was left out by rule."""

    path: str
    reason: str
    source: str = ""


Record = Document | Quarantined | Skipped


@dataclass
class Tally:
    """What a stream of records held: additive counts, for manifests and reports."""

    documents: Counter[str] = field(default_factory=Counter)
    """Documents by slice."""
    bytes: Counter[str] = field(default_factory=Counter)
    """UTF-8 bytes by slice."""
    quarantined: Counter[str] = field(default_factory=Counter)
    """Quarantined records by source."""
    lost_bytes: Counter[str] = field(default_factory=Counter)
    """Bytes of quarantined records by source, as far as they are known."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Skipped records by reason."""

    def add(self, record: Record) -> None:
        """Count one record."""
        match record:
            case Document():
                self.documents[record.slice] += 1
                self.bytes[record.slice] += record.n_bytes
            case Quarantined():
                self.quarantined[record.source] += 1
                self.lost_bytes[record.source] += record.n_bytes or 0
            case Skipped():
                self.skipped[record.reason] += 1


_EVIDENCE = pa.list_(pa.struct([(name, pa.string()) for name in Evidence._fields]))
_REPAIRS = pa.list_(
    pa.struct([("kind", pa.string()), ("start", pa.int64()), ("end", pa.int64()), ("detail", pa.string())])
)
DOCUMENT_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("kind", pa.string()),
        ("path", pa.string()),
        ("source", pa.string()),
        ("slice", pa.string()),
        ("text", pa.string()),
        ("prompt", pa.string()),
        ("rejected", pa.string()),
        ("gold", pa.string()),
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("licence", pa.string()),
        ("language", pa.string()),
        ("origin_ids", pa.list_(pa.string())),
        ("weight", pa.float64()),
        ("group", pa.string()),
        ("unit", pa.string()),
        ("labels", pa.map_(pa.string(), pa.float64())),
        ("steps", pa.list_(pa.struct([("end", pa.int64()), ("reward", pa.float64())]))),
        ("tests", pa.list_(pa.string())),
        ("content_hash", pa.string()),
        ("time", pa.timestamp("us", tz="UTC")),
        ("file_hash", pa.string()),
        (
            "provenance",
            pa.struct([("sha256", pa.string()), ("evidence", _EVIDENCE), ("repairs", _REPAIRS)]),
        ),
    ]
)

QUARANTINE_SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("line", pa.int64()),
        ("reason", pa.string()),
        ("excerpt", pa.string()),
        ("source", pa.string()),
        ("document_id", pa.string()),
        ("offset", pa.int64()),
        ("n_bytes", pa.int64()),
    ]
)


def write_records(folder: Path, records: Iterable[Record]) -> Tally:
    """Write a stream of records: documents to `documents.parquet`, quarantined ones to `quarantined.parquet`.

    Both files are written whatever the stream holds; memory stays at one row group.

    Args:
        folder: an existing folder.
        records: what a reader yields; an error that it raises passes through.

    Returns:
        The counts. Skipped records are counted and not written.
    """
    tally = Tally()
    rows: dict[str, list[dict[str, Any]]] = {DOCUMENTS: [], QUARANTINED: []}
    schemas = {DOCUMENTS: DOCUMENT_SCHEMA, QUARANTINED: QUARANTINE_SCHEMA}
    buffered_bytes = 0
    with ExitStack() as stack:
        writers = {
            name: stack.enter_context(pq.ParquetWriter(folder / name, schema, compression="zstd"))
            for name, schema in schemas.items()
        }

        def flush() -> None:
            for name, buffered in rows.items():
                if buffered:
                    writers[name].write_table(pa.Table.from_pylist(buffered, schemas[name]))
                    buffered.clear()

        for record in records:
            tally.add(record)
            if isinstance(record, Document):
                rows[DOCUMENTS].append(document_row(record))
                buffered_bytes += record.n_bytes
            elif isinstance(record, Quarantined):
                rows[QUARANTINED].append(record._asdict())
                buffered_bytes += len(record.excerpt)
            if buffered_bytes >= _ROW_GROUP_BYTES:
                flush()
                buffered_bytes = 0
        flush()
    return tally


def write_documents(folder: Path, documents: Iterable[Document]) -> Tally:
    """Write documents alone; see `write_records`."""
    return write_records(folder, documents)


def read_documents(folder: Path) -> Iterator[Document]:
    """The documents that `write_records` wrote, or that a data set holds in shards, in their order, streamed.

    Raises:
        BadInput: the folder holds no documents.
    """
    for row in _rows(folder, DOCUMENTS):
        yield document_of(row)


def read_quarantined(folder: Path) -> Iterator[Quarantined]:
    """The quarantined records that `write_records` wrote.

    Raises:
        BadInput: the folder holds no documents.
    """
    for row in _rows(folder, QUARANTINED):
        yield Quarantined(**row)


def _rows(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    whole, stem = folder / name, name.removesuffix(".parquet")
    paths = [whole] if whole.is_file() else sorted(folder.glob(f"{stem}-*.parquet"))
    if not paths:
        raise BadInput(
            f"no {name} here: not a folder of documents",
            where=folder,
            fix="give the folder of a documents stage, or of a data set",
        )
    for path in paths:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()


def document_row(document: Document) -> dict[str, Any]:
    """A document as a row of `DOCUMENT_SCHEMA`."""
    row = {name: getattr(document, name) for name in DOCUMENT_SCHEMA.names}
    messages = [message._asdict() for message in document.messages]
    steps = [step._asdict() for step in document.steps]
    row |= {"messages": messages, "labels": list(document.labels.items()), "steps": steps}
    if document.provenance is not None:
        sha256, evidence, repairs = document.provenance
        noted = {
            "evidence": [each._asdict() for each in evidence],
            "repairs": [each._asdict() for each in repairs],
        }
        row["provenance"] = {"sha256": sha256, **noted}
    return row


def document_of(row: Mapping[str, Any]) -> Document:
    """The document of a row; columns that older files lack have their defaults."""
    fields = {name: value for name, value in row.items() if name not in ("id", "content_hash")}
    fields["messages"] = tuple(Message(**message) for message in row["messages"])
    fields["origin_ids"] = tuple(row["origin_ids"])
    fields["labels"] = MappingProxyType(dict(row["labels"]))
    fields["steps"] = tuple(Step(**step) for step in row.get("steps", ()))
    fields["tests"] = tuple(row.get("tests") or ())
    noted = row.get("provenance")
    if noted is not None:
        evidence = tuple(Evidence(**each) for each in noted["evidence"])
        repairs = tuple(Repair(**each) for each in noted["repairs"])
        fields["provenance"] = Provenance(noted["sha256"], evidence, repairs)
    return Document(**fields)
