"""The tables of a store: artifacts, what they were made from, which stage made them, what they hold.

    stage --> artifact <-- edge (child, role, parent)
                 ^
                 +-- listing (document in artifact: slice, status) --> document <-- origin (derived from)

A document's id is a hash of its source, path and content, so one row describes it wherever it is listed. An
edge's parent need not be a row: an artifact may be made from one that another store holds.

The schema is changed by a migration in `migrations/versions/`, never here alone; a test compares the two.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, ForeignKey
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Table(DeclarativeBase):
    """The base of all tables of a store."""


class ArtifactRow(Table):
    """An artifact that was finished, as its manifest says it."""

    __tablename__ = "artifact"

    id: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str]
    content_hash: Mapped[str]
    code_version: Mapped[str]
    created_at: Mapped[str]
    recipe: Mapped[dict[str, Any]] = mapped_column(JSON)
    counts: Mapped[dict[str, Any]] = mapped_column(JSON)
    lists_documents: Mapped[bool]
    """Whether its listing is the whole truth about its documents; else they are its parents'."""


class EdgeRow(Table):
    """What an artifact was made from, and in which role."""

    __tablename__ = "edge"

    child_id: Mapped[str] = mapped_column(ForeignKey("artifact.id"), primary_key=True)
    role: Mapped[str] = mapped_column(primary_key=True)
    parent_id: Mapped[str] = mapped_column(index=True)


class StageRow(Table):
    """The artifact that a stage made, by the stage's cache key."""

    __tablename__ = "stage"

    key: Mapped[str] = mapped_column(primary_key=True)
    artifact_id: Mapped[str] = mapped_column(ForeignKey("artifact.id"), index=True)


class KnownDocument(Table):
    """A document that some artifact lists, or that one was derived from."""

    __tablename__ = "document"

    id: Mapped[str] = mapped_column(primary_key=True)
    path: Mapped[str] = mapped_column(index=True)
    source: Mapped[str]


class OriginRow(Table):
    """What a document was derived from."""

    __tablename__ = "origin"

    document_id: Mapped[str] = mapped_column(ForeignKey("document.id"), primary_key=True)
    origin_id: Mapped[str] = mapped_column(primary_key=True, index=True)


class ListingRow(Table):
    """A document in an artifact's listing."""

    __tablename__ = "listing"

    artifact_id: Mapped[str] = mapped_column(ForeignKey("artifact.id"), primary_key=True)
    document_id: Mapped[str] = mapped_column(ForeignKey("document.id"), primary_key=True, index=True)
    slice: Mapped[str]
    status: Mapped[str]
