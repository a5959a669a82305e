"""Documents: read from sources, split by their hash, and made into instruction pairs."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from gyrocompass.core.artifact import MANIFEST, Artifact, DocumentRow, Draft, read_artifact
from gyrocompass.core.lineage_graph import KEPT
from gyrocompass.data.curate.build import Builder
from gyrocompass.data.curate.config import BuildConfig
from gyrocompass.data.curate.executor import LocalExecutor
from gyrocompass.data.curate.optout import STORE_LIST, read_opt_out, without
from gyrocompass.data.curate.reading import link
from gyrocompass.data.curate.versions import find_dataset
from gyrocompass.data.document import (
    QUARANTINED,
    Document,
    Quarantined,
    Record,
    Tally,
    read_documents,
    write_records,
)
from gyrocompass.data.sources import Source, fingerprint, read_sources
from gyrocompass.data.split import Side, side
from gyrocompass.data.stdlib import pairs
from gyrocompass.recipe.stage import DocumentsName, DocumentsNames, Stage, Workplace


def _holding(sources: Sequence[Source]) -> dict[str, Artifact]:
    """Artifacts that files of sources stand in, by role."""
    paths = [
        Path(read.path)
        for source in sources
        for read in (source.files, source.jsonl, source.parquet)
        if read is not None
    ]
    folders = dict.fromkeys(
        folder for path in paths for folder in (path, *path.parents) if (folder / MANIFEST).is_file()
    )
    found = [read_artifact(folder, verify=False) for folder in folders]
    return {f"{one.manifest.kind}.{number}": one for number, one in enumerate(found)}


class DocumentsStage(Stage):
    """Documents of all sources, with what could not be used quarantined, counted and named."""

    kind: Literal["documents"] = "documents"
    makes: ClassVar[str] = "documents"
    sources: tuple[Source, ...] = Field(min_length=1)
    max_quarantined_share: float = Field(default=0.01, ge=0, le=1)
    """More malformed records than this fail the stage."""

    def outside(self) -> Any:
        """The state of the sources' files."""
        return [fingerprint(source) for source in self.sources]

    def origins(self) -> dict[str, Artifact]:
        """The data sets among the sources, and the artifacts whose files are read, such as feedback."""
        paths = [source.dataset.path for source in self.sources if source.dataset is not None]
        datasets = {f"dataset.{number}": find_dataset(Path(path)) for number, path in enumerate(paths)}
        return datasets | _holding(self.sources)

    def run(self, workplace: Workplace, draft: Draft) -> None:
        """Writes documents.parquet and quarantined.parquet, without what the store's opt-out list covers."""
        records = read_sources(self.sources, max_quarantined_share=self.max_quarantined_share)
        opt_out = read_opt_out([workplace.store.root / STORE_LIST])
        write_stage_records(draft, counting(without(records, opt_out), workplace))


class CuratedStage(Stage):
    """Documents of a data set that is built here: read, looked at, decided, each drop with its reason."""

    kind: Literal["curated"] = "curated"
    makes: ClassVar[str] = "documents"
    build: BuildConfig

    def origins(self) -> dict[str, Artifact]:
        """The artifacts whose files are read, such as feedback."""
        return _holding(self.build.sources)

    def outside(self) -> Any:
        """The state of the sources' files, and the opt-out lists."""
        opt_out = read_opt_out(map(Path, self.build.opt_out))
        return [[fingerprint(source) for source in self.build.sources], opt_out.digest]

    def run(self, workplace: Workplace, draft: Draft) -> None:
        """Builds the data set into the store, and takes its documents as they are."""
        with LocalExecutor() as executor:
            built = Builder(workplace.store, executor, workplace.progress).build(self.build)
        for path in sorted(built.dataset.path.glob("documents-*.parquet")):
            link(path, draft.path / path.name)
        link(built.dataset.path / QUARANTINED, draft.path / QUARANTINED)
        draft.parents["dataset"] = built.dataset.id
        draft.counts |= {**built.dataset.manifest.counts, "skipped": built.corpus.manifest.counts["skipped"]}
        rows = workplace.store.documents(built.dataset.id)
        draft.documents = [row for row in rows if row.status == KEPT]


class SplitStage(Stage):
    """One side of a split by content hash: equal contents are on one side, whatever their number or order."""

    kind: Literal["split"] = "split"
    makes: ClassVar[str] = "documents"
    documents: DocumentsName
    side: Side
    held_out_share: float = Field(default=0.05, gt=0, lt=1)
    salt: str = ""
    """Another salt is another split."""

    def run(self, workplace: Workplace, draft: Draft) -> None:
        """Writes documents.parquet."""
        documents = read_documents(workplace.input("documents"))
        chosen = (d for d in documents if side(d, self.held_out_share, self.salt) == self.side)
        write_stage_records(draft, counting(chosen, workplace))


class TogetherStage(Stage):
    """Documents of several stages in one, such as feedback and what is replayed; each document once."""

    kind: Literal["together"] = "together"
    makes: ClassVar[str] = "documents"
    documents: DocumentsNames

    def run(self, workplace: Workplace, draft: Draft) -> None:
        """Writes documents.parquet."""
        folders = [workplace.input(f"documents.{number}") for number in range(len(self.documents))]
        seen: set[str] = set()

        def once() -> Iterator[Document]:
            for folder in folders:
                for document in read_documents(folder):
                    if document.id not in seen:
                        seen.add(document.id)
                        yield document

        write_stage_records(draft, counting(once(), workplace))


class PairsStage(Stage):
    """Instruction pairs derived from Python documents: signature -> docstring, docstring -> body."""

    kind: Literal["pairs"] = "pairs"
    makes: ClassVar[str] = "documents"
    documents: DocumentsName

    def outside(self) -> Any:
        """The interpreter's version: its parser decides what is a function."""
        return list(sys.version_info[:2])

    def run(self, workplace: Workplace, draft: Draft) -> None:
        """Writes documents.parquet with conversations; each knows the document it was derived from."""
        derived = pairs(read_documents(workplace.input("documents")))
        write_stage_records(draft, counting(derived, workplace))


def listed(document: Document) -> DocumentRow:
    """A document's row in the store."""
    return DocumentRow(
        document_id=document.id,
        path=document.path,
        source=document.source,
        slice=document.slice,
        origin_ids=document.origin_ids,
    )


def counting(records: Iterable[Record], workplace: Workplace) -> Iterator[Record]:
    """The records, with progress shown."""
    task = workplace.progress.task(workplace.name, None, unit="doc")
    for record in records:
        yield record
        task.advance(1)
    task.finish()


def write_stage_records(draft: Draft, records: Iterable[Record]) -> None:
    """Write a stage's records, and list and count them in its draft."""
    rows: list[DocumentRow] = []
    tally = write_records(draft.path, _listing(records, rows))
    draft.documents = rows
    _count(draft, tally)


def _listing(records: Iterable[Record], rows: list[DocumentRow]) -> Iterator[Record]:
    for record in records:
        if isinstance(record, Document):
            rows.append(listed(record))
        elif isinstance(record, Quarantined) and record.document_id:
            rows.append(DocumentRow(record.document_id, record.path, record.source, "", status="quarantined"))
        yield record


def _count(draft: Draft, tally: Tally) -> None:
    draft.counts |= {
        "documents": sum(tally.documents.values()),
        "bytes": sum(tally.bytes.values()),
        "quarantined": sum(tally.quarantined.values()),
        "skipped": sum(tally.skipped.values()),
    }
    draft.counts |= {f"documents/{name}": count for name, count in sorted(tally.documents.items())}
    draft.counts |= {f"bytes/{name}": count for name, count in sorted(tally.bytes.items())}
