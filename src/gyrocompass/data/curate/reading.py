"""Reading sources into a corpus: each source resumable by itself, each document once, none that is opted out.

    sources --read_corpus--> an artifact `corpus`: corpus-00000.parquet, ..., quarantined.parquet

A document that stands twice (one file that two sources list) is read once. Two records that give themselves
one name but say different things are a mistake of the source: the second is quarantined, since whoever asks
for the document by its name could mean either.

What was read is known by 64-bit hashes, 16 bytes a document in sorted arrays: among a hundred million
documents two would be taken for one with a chance of 3 in 10,000.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from gyrocompass.core.artifact import Artifact, DocumentRow
from gyrocompass.core.config import config_hash
from gyrocompass.core.errors import BadInput
from gyrocompass.core.folder import land, staging, sync
from gyrocompass.core.progress import Progress, Task
from gyrocompass.core.store import Store
from gyrocompass.data.curate.config import BuildConfig
from gyrocompass.data.curate.corpus import Corpus, CorpusWriter
from gyrocompass.data.curate.optout import STORE_LIST, OptOut, read_opt_out, without
from gyrocompass.data.document import (
    QUARANTINE_SCHEMA,
    QUARANTINED,
    Document,
    Quarantined,
    Record,
    Skipped,
)
from gyrocompass.data.sources import LISTED_TWICE, Source, fingerprint, read_sources

CORPUS = "corpus"
"""The kind of artifact."""

SKIPPED = "skipped.json"
"""How many records each rule of reading left out."""

NAMED_TWICE = "duplicate id: another record of this name came before and says something else"

_VERSION = 1
_MERGE_AT = 2**16


class Seen:
    """A set of texts that remembers 64 bits of each."""

    def __init__(self) -> None:
        self._sorted: list[npt.NDArray[np.uint64]] = []
        self._new: set[int] = set()

    def __contains__(self, text: str) -> bool:
        number = _hashed(text)
        return number in self._new or any(_holds(array, number) for array in self._sorted)

    def add(self, text: str) -> None:
        """Remember a text."""
        self._new.add(_hashed(text))
        if len(self._new) >= _MERGE_AT:
            self._sorted.append(np.array(sorted(self._new), np.uint64))
            self._new.clear()
            while len(self._sorted) > 1 and len(self._sorted[-2]) <= 2 * len(self._sorted[-1]):
                last = self._sorted.pop()
                self._sorted[-1] = np.union1d(self._sorted[-1], last)


def _hashed(text: str) -> int:
    data = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def _holds(array: npt.NDArray[np.uint64], number: int) -> bool:
    place = int(np.searchsorted(array, np.uint64(number)))
    return place < len(array) and int(array[place]) == number


class Once:
    """Lets each document through once, and no two that have one name but say different things."""

    def __init__(self) -> None:
        self._contents, self._names = Seen(), Seen()

    def admit(self, document: Document) -> Record:
        """The document, or what becomes of it instead."""
        place = os.path.abspath(document.path)  # noqa: PTH100  (a record's, which may not be a path)
        content, name = f"{place}\0{document.content_hash}", f"{document.source}\0{document.path}"
        if content in self._contents:
            return Skipped(document.path, LISTED_TWICE, document.source)
        if name in self._names:
            return Quarantined(document.path, None, NAMED_TWICE, "", document.source, document.id)
        self.note(document.path, document.source, document.content_hash)
        return document

    def note(self, path: str, source: str, content_hash: str) -> None:
        """Remember a document that was read before."""
        self._contents.add(f"{os.path.abspath(path)}\0{content_hash}")  # noqa: PTH100
        self._names.add(f"{source}\0{path}")


def stored_key(recipe: Mapping[str, Any]) -> str:
    """The cache key of a corpus: its recipe says what is read, the state of its files, what is left out."""
    return "corpus-" + config_hash([_VERSION, recipe])


def opt_out_of(config: BuildConfig, store: Store) -> OptOut:
    """The lists of a build and of its store together."""
    return read_opt_out([store.root / STORE_LIST, *map(Path, config.opt_out)])


def read_corpus(config: BuildConfig, store: Store, progress: Progress) -> tuple[Artifact, bool]:
    """Read all sources, or find the corpus that was read from them; and whether it was found.

    Raises:
        BadInput: a source is missing, holds no document, or too much of it cannot be read.
    """
    prints = [fingerprint(source) for source in config.sources]
    opt_out = opt_out_of(config, store)
    recipe = {
        "sources": [source.model_dump(mode="json") for source in config.sources],
        "fingerprints": prints,
        "max_quarantined_share": config.max_quarantined_share,
        "shard_bytes": config.shard_bytes,
        "opt_out": opt_out.digest,
    }
    key = stored_key(recipe)
    found = store.find(key)
    if found is not None:
        return found, True
    with store.locked_work(key, f"the corpus of {config.name}"):
        work = store.work_dir(key)
        once = Once()
        task = progress.task("read", None, unit="doc")
        folders = []
        for number, source in enumerate(config.sources):
            folder = work / f"source-{number:04d}"
            if folder.exists():
                _remember(folder, once, task)
            else:
                _read_source(config, source, folder, once, opt_out, task)
            folders.append(folder)
        task.finish()
        with store.create(key, CORPUS, recipe=recipe) as draft:
            draft.counts |= _gather(folders, draft.path)
            if not draft.counts["documents"]:
                raise BadInput("no document is left after opt-outs", where=config.name)
            draft.documents = _listed(folders)
        store.forget_work(key)
    return draft.artifact, False


def _read_source(
    config: BuildConfig, source: Source, target: Path, once: Once, opt_out: OptOut, task: Task
) -> None:
    """One source into a folder that appears whole."""
    quarantined: list[Quarantined] = []
    skipped: Counter[str] = Counter()
    with staging(target.parent) as folder:
        writer = CorpusWriter(folder, shard_bytes=config.shard_bytes)
        records = read_sources([source], max_quarantined_share=config.max_quarantined_share)
        for record in without(records, opt_out):
            if isinstance(record, Document):
                record = once.admit(record)
            if isinstance(record, Document):
                writer.write(record)
                task.advance(1)
            elif isinstance(record, Quarantined):
                quarantined.append(record)
            else:
                skipped[record.reason] += 1
        writer.close()
        rows = [record._asdict() for record in quarantined]
        pq.write_table(pa.Table.from_pylist(rows, QUARANTINE_SCHEMA), folder / QUARANTINED)
        (folder / SKIPPED).write_text(json.dumps(skipped, sort_keys=True), encoding="utf-8")
        sync(folder)
        land(folder, target, replace=False)


def _remember(folder: Path, once: Once, task: Task) -> None:
    for batch in _batches(folder, ["path", "source", "content_hash"]):
        for row in batch.to_pylist():
            once.note(**row)
        task.advance(batch.num_rows)


def _batches(folder: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    if any(folder.glob("corpus-*.parquet")):
        yield from Corpus(folder).batches(columns)


def _gather(folders: Iterable[Path], target: Path) -> dict[str, int | float]:
    """The shards of all sources under one numbering; what they hold."""
    shards = 0
    counts: Counter[str] = Counter(dict.fromkeys(("documents", "bytes", "quarantined", "skipped"), 0))
    tables, skipped = [], Counter[str]()
    for folder in folders:
        for path in sorted(folder.glob("corpus-*.parquet")):
            link(path, target / f"corpus-{shards:05d}.parquet")
            shards += 1
        for batch in _batches(folder, ["slice", "n_bytes"]):
            for name, n_bytes in zip(batch["slice"].to_pylist(), batch["n_bytes"].to_pylist(), strict=True):
                counts.update(
                    {"documents": 1, "bytes": n_bytes, f"documents/{name}": 1, f"bytes/{name}": n_bytes}
                )
        tables.append(pq.read_table(folder / QUARANTINED))
        skipped.update(json.loads((folder / SKIPPED).read_text("utf-8")))
    quarantined = pa.concat_tables(tables)
    pq.write_table(quarantined, target / QUARANTINED)
    (target / SKIPPED).write_text(json.dumps(skipped, sort_keys=True), encoding="utf-8")
    counts["quarantined"], counts["skipped"] = quarantined.num_rows, sum(skipped.values())
    return dict(counts)


def link(source: Path, target: Path) -> None:
    """Give a finished file another name: without a copy where the file system can."""
    try:
        os.link(source, target)
    except OSError:
        target.write_bytes(source.read_bytes())


def _listed(folders: Iterable[Path]) -> Iterator[DocumentRow]:
    for folder in folders:
        for batch in _batches(folder, ["id", "path", "source", "slice", "origin_ids"]):
            for row in batch.to_pylist():
                origins = tuple(row["origin_ids"])
                yield DocumentRow(row["id"], row["path"], row["source"], row["slice"], origin_ids=origins)
        for row in pq.read_table(folder / QUARANTINED).to_pylist():
            if row["document_id"]:
                yield DocumentRow(row["document_id"], row["path"], row["source"], "", "quarantined")
