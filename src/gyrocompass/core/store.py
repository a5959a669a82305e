"""The store: finished artifacts by id and by the stage that made them, and their lineage in a database.

    root/artifacts/<id>/    finished artifacts, each a whole folder
    root/work/<key>/        what an unfinished stage keeps to go on from
    root/store.sqlite       the database, unless a URL names another

The folders are the truth about what artifacts hold; the database is the truth about which exist, which stage
made them, and which documents they list. An artifact is landed first and registered then, so every row has
(or had) a folder. A crash between the two leaves a folder that nothing refers to; the stage, run again, lands
on it. A folder that was deleted is simply not found, and its stage runs again.

Not here: deleting artifacts. A person may delete any folder below `artifacts/`; lineage still knows it.
"""

from __future__ import annotations

import difflib
import itertools
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import Connection, or_, select, update
from sqlalchemy.engine import URL

from gyrocompass.core.artifact import (
    Artifact,
    ArtifactId,
    DocumentRow,
    Draft,
    Manifest,
    read_artifact,
    seal,
)
from gyrocompass.core.database import Database, upsert
from gyrocompass.core.errors import BadInput, DamagedArtifact, GyroError
from gyrocompass.core.folder import land, locked, staging, sweep
from gyrocompass.core.tables import (
    ArtifactRow,
    EdgeRow,
    KnownDocument,
    ListingRow,
    OriginRow,
    StageRow,
)

_PAGE_ROWS = 10_000


class ArtifactSummary(NamedTuple):
    """One line about an artifact."""

    id: ArtifactId
    kind: str
    created_at: str
    code_version: str
    counts: dict[str, int | float]
    present: bool
    """Whether its folder is still there."""


class Store:
    """Artifacts, found again by key or id, with the lineage between them.

    Args:
        root: the store's folder; made if needed.
        url: the database; by default SQLite in the folder. `postgresql://...` needs the extra `postgres`.
        make: whether a folder that is not there is made: who only reads need not.

    Raises:
        BadInput: the folder cannot be made or read, or is not there.
        GyroError: the database cannot be used; see `Database`.
    """

    def __init__(self, root: Path, url: str | None = None, *, make: bool = True) -> None:
        self.root = root.absolute()
        self._artifacts = self.root / "artifacts"
        if not make and not self.root.is_dir():
            raise BadInput("there is no store here", where=self.root, fix="name the one to read with --store")
        try:
            self._artifacts.mkdir(parents=True, exist_ok=True)
            sweep(self._artifacts)
        except OSError as error:
            raise BadInput(
                f"no store can be here: {error.strerror}",
                where=self.root,
                fix="choose a folder that can be written to with --store",
            ) from error
        self.database = Database(url or beside(self.root))

    def find(self, key: str, *, verify: bool = True) -> Artifact | None:
        """The artifact that the stage with this cache key made, or None if the stage has to run.

        Args:
            key: the stage's cache key.
            verify: whether to hash every file, or only to check names and sizes.

        Raises:
            DamagedArtifact: the artifact is there but not as it was written.
        """
        with self.database.read() as connection:
            artifact_id = connection.scalar(select(StageRow.artifact_id).where(StageRow.key == key))
        if artifact_id is None or not (self._artifacts / artifact_id).exists():
            return None
        return self._read(artifact_id, verify=verify)

    def set_aside(self, key: str) -> Path:
        """Move the artifact that a stage made out of the way, so that it is made again; where it is now."""
        with self.database.read() as connection:
            artifact_id = connection.scalar(select(StageRow.artifact_id).where(StageRow.key == key))
        aside = self.root / "damaged"
        aside.mkdir(exist_ok=True)
        target = next(path for n in itertools.count(1) if not (path := aside / f"{artifact_id}.{n}").exists())
        (self._artifacts / str(artifact_id)).rename(target)
        return target

    @contextmanager
    def create(
        self,
        key: str,
        kind: str,
        *,
        parents: Mapping[str, Artifact] | None = None,
        recipe: Mapping[str, Any] | None = None,
    ) -> Iterator[Draft]:
        """Write the artifact of a stage: files below `draft.path`, `draft.counts`, `draft.documents`.

        At the end of the block it is hashed, landed and registered, and `draft.artifact` is set. If the
        same artifact exists already, the existing one stays. On an error nothing is left.

        Args:
            key: the stage's cache key, for `find`.
            kind: what it is, in small letters, digits and underscores.
            parents: what it is made from, by role. Roles that begin with `held_out` mean: measured on, not
                learned from.
            recipe: the config of the stage.
        """
        made_from = dict(parents or {})
        with staging(self._artifacts) as folder:
            ids = {role: parent.id for role, parent in made_from.items()}
            draft = Draft(folder, kind, ids, dict(recipe or {}))
            yield draft
            manifest = seal(draft)
            artifact = self._land(folder, manifest)
            with self.database.write() as connection:
                for parent in made_from.values():
                    # A parent may come from elsewhere; then this is the first that the database hears of it.
                    _register(connection, parent.manifest)
                _register(connection, artifact.manifest, renewed=("code_version", "created_at", "counts"))
                stage = {"key": key, "artifact_id": artifact.id}
                upsert(connection, StageRow, [stage], renewed=["artifact_id"])
                if draft.documents is not None:
                    _list_documents(connection, artifact.id, draft.documents)
            draft.artifact = artifact

    def open(self, artifact_id: str, *, verify: bool = True) -> Artifact:
        """The artifact with this id, or with the only id (or hash) that begins so.

        Raises:
            BadInput: no artifact or several match, or its folder was deleted.
            DamagedArtifact: it is not as it was written.
        """
        with self.database.read() as connection:
            found = matching_artifacts(connection, artifact_id)
            if len(found) != 1:
                known = list(connection.scalars(select(ArtifactRow.id)))
                raise _not_one(artifact_id, found, known, where=self.root)
        if not (self._artifacts / found[0]).exists():
            raise BadInput(
                f"the artifact {found[0]} was made here, but its folder is gone",
                where=self._artifacts / found[0],
                fix="run its stage again; `gyro lineage` tells its recipe",
            )
        return self._read(found[0], verify=verify)

    def record_documents(self, artifact_id: ArtifactId, rows: Iterable[DocumentRow]) -> None:
        """Add documents to an artifact's listing, which from then on says what it holds.

        Raises:
            BadInput: there is no such artifact.
        """
        with self.database.write() as connection:
            if connection.scalar(select(ArtifactRow.id).where(ArtifactRow.id == artifact_id)) is None:
                raise BadInput(f"there is no artifact {artifact_id}", where=self.root)
            _list_documents(connection, artifact_id, rows)

    def documents(self, artifact_id: ArtifactId) -> Iterator[DocumentRow]:
        """The documents an artifact lists, by id, read page by page."""
        after = ""
        while True:
            with self.database.read() as connection:
                page = _document_page(connection, artifact_id, after)
            yield from page
            if len(page) < _PAGE_ROWS:
                return
            after = page[-1].document_id

    def artifacts(self) -> list[ArtifactSummary]:
        """All artifacts the database knows, oldest first."""
        with self.database.read() as connection:
            columns = (ArtifactRow.id, ArtifactRow.kind, ArtifactRow.created_at, ArtifactRow.code_version)
            rows = connection.execute(
                select(*columns, ArtifactRow.counts).order_by(ArtifactRow.created_at, ArtifactRow.id)
            ).all()
        return [
            ArtifactSummary(artifact_id, kind, made, code, counts, (self._artifacts / artifact_id).is_dir())
            for artifact_id, kind, made, code, counts in rows
        ]

    def folder(self, artifact_id: ArtifactId) -> Path:
        """Where the folder of an artifact is, or would be."""
        return self._artifacts / artifact_id

    def folders(self, kind: str) -> list[Path]:
        """The folders of all artifacts of a kind that are here, whole or damaged."""
        return sorted(path for path in self._artifacts.glob(f"{kind}-*") if path.is_dir())

    def work_dir(self, key: str) -> Path:
        """The folder in which the stage with this key keeps what it goes on from; made if needed."""
        folder = self._work(key)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @contextmanager
    def locked_work(self, key: str, where: str) -> Iterator[None]:
        """Keep a stage's work folder to this process as long as the block runs.

        Args:
            key: the stage's cache key.
            where: what an error names as the place.

        Raises:
            GyroError: another process has it.
        """
        with locked(self._work(key)) as ours:
            if not ours:
                raise GyroError(
                    "another process is running this stage", where=where, fix="wait for it, and run again"
                )
            yield

    def forget_work(self, key: str) -> None:
        """Delete a stage's work folder, when its artifact is finished or it is to begin anew."""
        folder = self._work(key)
        if folder.exists():
            shutil.rmtree(folder)

    def _work(self, key: str) -> Path:
        assert re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", key), f"not a key: {key!r}"
        return self.root / "work" / key

    def _land(self, folder: Path, manifest: Manifest) -> Artifact:
        target = self._artifacts / manifest.id
        if not land(folder, target, replace=False):
            try:
                return read_artifact(target)
            except DamagedArtifact:
                # What was just written is whole, and by its id the same.
                land(folder, target, replace=True)
        return Artifact(target, manifest)

    def _read(self, artifact_id: ArtifactId, *, verify: bool) -> Artifact:
        folder = self._artifacts / artifact_id
        try:
            artifact = read_artifact(folder, verify=verify)
            if artifact.id != artifact_id:
                raise DamagedArtifact(f"this folder holds the artifact {artifact.id}", where=folder)
        except DamagedArtifact as error:
            raise DamagedArtifact(
                f"the artifact {artifact_id} is damaged: {error.what}",
                where=error.where,
                fix=f"delete {folder}; the stage that made it then runs again",
            ) from error
        return artifact


def beside(root: Path) -> URL:
    """The database of a store for which no URL is given."""
    return URL.create("sqlite", database=str(root / "store.sqlite"))


def matching_artifacts(connection: Connection, name: str) -> list[ArtifactId]:
    """The artifacts that a name can mean: the one of that id, else those whose id or hash begins with it."""
    if connection.scalar(select(ArtifactRow.id).where(ArtifactRow.id == name)) is not None:
        return [name]
    begins = or_(
        ArtifactRow.id.startswith(name, autoescape=True),
        ArtifactRow.content_hash.startswith(name, autoescape=True),
    )
    return list(connection.scalars(select(ArtifactRow.id).where(begins).order_by(ArtifactRow.id)))


def _not_one(name: str, found: list[str], known: list[str], *, where: Path) -> BadInput:
    if found:
        shown = ", ".join(found[:8]) + (", ..." if len(found) > 8 else "")
        return BadInput(
            f"{name!r} may be any of {len(found)} artifacts: {shown}", where=where, fix="write more of the id"
        )
    nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.3)
    end = f"; the nearest: {', '.join(nearest)}" if nearest else f" among the store's {len(known)}"
    return BadInput(f"there is no artifact {name!r}{end}", where=where)


def _register(connection: Connection, manifest: Manifest, *, renewed: Collection[str] = ()) -> None:
    columns = {"id", "kind", "content_hash", "code_version", "created_at", "recipe", "counts"}
    row = {name: getattr(manifest, name) for name in columns}
    upsert(connection, ArtifactRow, [{**row, "lists_documents": False}], renewed=renewed)
    edges = [
        {"child_id": manifest.id, "role": role, "parent_id": parent_id}
        for role, parent_id in manifest.parents.items()
    ]
    upsert(connection, EdgeRow, edges)


def _list_documents(connection: Connection, artifact_id: ArtifactId, rows: Iterable[DocumentRow]) -> None:
    connection.execute(update(ArtifactRow).where(ArtifactRow.id == artifact_id).values(lists_documents=True))
    remaining = iter(rows)
    while page := list(itertools.islice(remaining, _PAGE_ROWS)):
        documents = [{"id": row.document_id, "path": row.path, "source": row.source} for row in page]
        origins = [
            {"document_id": row.document_id, "origin_id": origin_id}
            for row in page
            for origin_id in row.origin_ids
        ]
        listings = [
            {
                "artifact_id": artifact_id,
                "document_id": row.document_id,
                "slice": row.slice,
                "status": row.status,
            }
            for row in page
        ]
        upsert(connection, KnownDocument, documents)
        upsert(connection, OriginRow, origins)
        upsert(connection, ListingRow, listings, renewed=("slice", "status"))


def _document_page(connection: Connection, artifact_id: ArtifactId, after: str) -> list[DocumentRow]:
    """The next documents of a listing, in the order of their ids."""
    page = (
        select(ListingRow.document_id, ListingRow.slice, ListingRow.status)
        .where(ListingRow.artifact_id == artifact_id, ListingRow.document_id > after)
        .order_by(ListingRow.document_id)
        .limit(_PAGE_ROWS)
        .subquery()
    )
    origins: dict[str, list[str]] = {}
    for document_id, origin_id in connection.execute(
        select(OriginRow.document_id, OriginRow.origin_id)
        .join(page, page.c.document_id == OriginRow.document_id)
        .order_by(OriginRow.document_id, OriginRow.origin_id)
    ):
        origins.setdefault(document_id, []).append(origin_id)
    return [
        DocumentRow(document_id, path, source, name, status, tuple(origins.get(document_id, ())))
        for document_id, path, source, name, status in connection.execute(
            select(page.c.document_id, KnownDocument.path, KnownDocument.source, page.c.slice, page.c.status)
            .join(KnownDocument, KnownDocument.id == page.c.document_id)
            .order_by(page.c.document_id)
        )
    ]
