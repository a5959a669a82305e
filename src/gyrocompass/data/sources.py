"""Sources: where documents come from, as a recipe lists them.

    sources:
      - stdlib: {limits: {code/tests: {bytes: 1000000}}}
      - files: {path: notes, include: ["**/*.md"], slice: prose/notes}
      - jsonl: {path: "chats/*.jsonl.gz", licence: CC-BY-4.0}
      - parquet: {path: export, fields: {text: content}}
      - datasets: {path: saved, split: train}
      - dataset: {path: gyro-store/datasets/notes.json}
      - ingest: {path: "dumps/*.tar.gz", html: resiliparse}
      - debian: {packages: ["*-doc", fortunes*]}

    sources --read_sources--> Document | Quarantined | Skipped, one after the other

A record that two sources have in common is read once. A source that yields no document fails, and so does one
with more than a set share of malformed records: a broken export should stop a run before it trains on what is
left. The share is that of all its records. A file whose name is not UTF-8 is quarantined.

`ingest` reads raw files of any kind, archives and web pages among them, and notes where each document comes
from (`gyrocompass.data.ingest`); the others read what is a data set already. `files` reads program and prose
files whole, one document a file, and files of records by their suffix. Text is UTF-8; Windows line ends
become plain ones. Hidden files and folders are left out, links to folders are not followed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from pydantic import Field, model_validator

from gyrocompass.core.config import Config
from gyrocompass.core.errors import BadInput
from gyrocompass.data.curate.versions import find_dataset
from gyrocompass.data.debian import DebianSource, fingerprint_debian, read_debian
from gyrocompass.data.document import EXCERPT_LENGTH, Document, Quarantined, Record, Skipped, read_documents
from gyrocompass.data.filetypes import CODE_LANGUAGES, JSONL_SUFFIXES, PARQUET_SUFFIXES, TEXT_SUFFIXES
from gyrocompass.data.ingest.config import IngestSource
from gyrocompass.data.ingest.read import read_ingest
from gyrocompass.data.paths import is_unnamed, matched, unnamed
from gyrocompass.data.records import Labels, RecordOptions
from gyrocompass.data.stdlib import StdlibSource, fingerprint_stdlib, read_stdlib
from gyrocompass.data.tables import is_dataset_folder, read_dataset, read_jsonl, read_parquet

LISTED_TWICE = "listed twice, read before"


class FilesSource(Labels):
    """Files and folders: program files and prose whole, files of records record by record."""

    path: str = Field(min_length=1)
    """A file, a folder, or a pattern such as `notes/**/*.md`."""
    include: tuple[str, ...] = ()
    """Patterns below a folder; what they match is read whatever its suffix. Empty: the known suffixes."""


class JsonlSource(RecordOptions):
    """JSON lines: a file, a folder of them, or a pattern; `.gz` is uncompressed."""

    path: str = Field(min_length=1)


class ParquetSource(RecordOptions):
    """Parquet: a file, a folder of them, or a pattern."""

    path: str = Field(min_length=1)


class DatasetsSource(RecordOptions):
    """A folder that `save_to_disk()` of `datasets` wrote."""

    path: str = Field(min_length=1)
    split: str | None = None


class DatasetSource(Config):
    """A data set that `gyro data build` made: its documents as they are, ids and all."""

    path: str = Field(min_length=1)
    """Its folder in a store, or `datasets/NAME.json` of a store: the last one of a name."""


class Source(Config):
    """One source; exactly one of the keys."""

    stdlib: StdlibSource | None = None
    files: FilesSource | None = None
    jsonl: JsonlSource | None = None
    parquet: ParquetSource | None = None
    datasets: DatasetsSource | None = None
    dataset: DatasetSource | None = None
    ingest: IngestSource | None = None
    debian: DebianSource | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Source:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            known = ", ".join(type(self).model_fields)
            raise ValueError(f"a source has one key of {known}; found {', '.join(given) or 'none'}")
        return self


def read_sources(sources: Iterable[Source], *, max_quarantined_share: float | None) -> Iterator[Record]:
    """Read sources one after the other, and each record of a file once: listed again, it is skipped.

    Args:
        sources: what to read.
        max_quarantined_share: of each source's records, 0 to 1; None: whatever cannot be used is left out,
            even where nothing else is there.

    Raises:
        BadInput: a source is missing, yields no document, or holds too many records that cannot be used.
    """
    read: set[tuple[str, str]] = set()
    for source in sources:
        n_records, n_documents = 0, 0
        quarantined: list[Quarantined] = []
        for record in _read(source):
            n_records += 1
            if isinstance(record, Document):
                n_documents += 1
                place = os.path.abspath(record.path), record.content_hash  # noqa: PTH100  (a record's)
                if place in read:
                    yield Skipped(record.path, LISTED_TWICE, record.source)
                    continue
                read.add(place)
            elif isinstance(record, Quarantined):
                quarantined.append(record)
            yield record
        if max_quarantined_share is None:
            continue
        if len(quarantined) > max_quarantined_share * n_records:
            raise _too_many(source, quarantined, n_records, max_quarantined_share)
        if not n_documents:
            raise BadInput(
                "the source holds no document", where=_where(source), fix="check its path and its files"
            )


def fingerprint(source: Source) -> str:
    """A hash of the files that the source would read, names and contents: equal if and only if they are.

    Raises:
        BadInput: there are none.
    """
    if source.stdlib is not None:
        return fingerprint_stdlib()
    if source.debian is not None:
        return fingerprint_debian(source.debian)
    if source.dataset is not None:
        return find_dataset(Path(source.dataset.path)).manifest.content_hash
    digest = hashlib.sha256()
    for path in _paths(source):
        digest.update(f"{path.as_posix()}\0".encode(errors="surrogateescape"))
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _too_many(source: Source, quarantined: list[Quarantined], n_records: int, most: float) -> BadInput:
    first = "\n".join(
        f"    {record.path}{f':{record.line}' if record.line else ''}: {record.reason}"
        for record in quarantined[:3]
    )
    return BadInput(
        f"{len(quarantined)} of {n_records} records cannot be used ({len(quarantined) / n_records:.1%}, "
        f"at most {most:.1%} may); the first of them:\n{first}",
        where=_where(source),
        fix="mend the records, or raise max_quarantined_share",
    )


def _where(source: Source) -> str:
    for located in (
        source.files,
        source.jsonl,
        source.parquet,
        source.datasets,
        source.dataset,
        source.ingest,
    ):
        if located:
            return located.path
    return source.debian.root if source.debian else "the standard library"


def _read(source: Source) -> Iterator[Record]:
    if source.stdlib:
        yield from read_stdlib(source.stdlib)
    elif source.ingest:
        yield from read_ingest(source.ingest)
    elif source.debian:
        yield from read_debian(source.debian)
    elif source.dataset:
        yield from read_documents(find_dataset(Path(source.dataset.path), verify=True).path)
    elif source.files:
        yield from _read_files(source.files)
    elif source.datasets:
        name = source.datasets.name or source.datasets.path
        yield from read_dataset(Path(source.datasets.path), source.datasets.split, source.datasets, name)
    elif source.jsonl or source.parquet:
        options = source.jsonl or source.parquet
        assert options
        read = read_jsonl if source.jsonl else read_parquet
        for path in _paths(source):
            name = options.name or options.path
            yield from [unnamed(path, name)] if is_unnamed(path) else read(path, options, name)


def _read_files(config: FilesSource) -> Iterator[Record]:
    name = config.name or config.path
    options = RecordOptions(**config.model_dump(include=set(Labels.model_fields)))
    if is_dataset_folder(Path(config.path)):
        yield from read_dataset(Path(config.path), None, options, name)
        return
    for path in matched(config.path, config.include):
        if is_unnamed(path):
            yield unnamed(path, name)
        elif path.name.endswith(JSONL_SUFFIXES):
            yield from read_jsonl(path, options, name)
        elif path.name.endswith(PARQUET_SUFFIXES):
            yield from read_parquet(path, options, name)
        elif config.include or _is_known(path) or not Path(config.path).is_dir():
            yield _read_file(path, config, name)
        else:
            yield Skipped(path.as_posix(), f"not a suffix of text or code: {path.suffix or 'none'}", name)


def _is_known(path: Path) -> bool:
    return path.suffix.lower() in CODE_LANGUAGES or path.suffix.lower() in TEXT_SUFFIXES


def _read_file(path: Path, config: FilesSource, name: str) -> Record:
    """One file as one document: UTF-8, with or without a byte-order mark."""
    data = path.read_bytes()
    if not data.strip():
        return Skipped(path.as_posix(), "empty file", name)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        excerpt = data[:EXCERPT_LENGTH].decode("utf-8", "replace")
        return Quarantined(path.as_posix(), line, f"not UTF-8: {error.reason}", excerpt, name)
    language = CODE_LANGUAGES.get(path.suffix.lower())
    return Document(
        kind="text",
        text=text.replace("\r\n", "\n"),
        path=path.as_posix(),
        source=name,
        slice=config.slice or ("code" if language else "text"),
        licence=config.licence,
        language=config.language or language,
        weight=config.weight,
    )


def _paths(source: Source) -> list[Path]:
    """The files that a source reads, sorted.

    Raises:
        BadInput: there are none.
    """
    if source.jsonl:
        return matched(source.jsonl.path, tuple(f"**/*{suffix}" for suffix in JSONL_SUFFIXES))
    if source.parquet:
        return matched(source.parquet.path, tuple(f"**/*{suffix}" for suffix in PARQUET_SUFFIXES))
    if source.datasets:
        return matched(source.datasets.path, ())
    if source.ingest:
        return matched(source.ingest.path, source.ingest.include)
    assert source.files
    return matched(source.files.path, source.files.include)
