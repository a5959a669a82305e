"""Lineage: from an artifact to what it was made from and what came of it; from a document to all that saw it.

    walk(store, name) -> Lineage -> render(lineage) for the terminal

The rule for what saw a document stands in `lineage_graph.py`. The graph of artifacts is read whole (there are
thousands at most); of documents, only those asked about are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Set
from functools import cached_property
from typing import Any

from sqlalchemy import Connection, func, literal, or_, select, union

from gyrocompass.core.artifact import ArtifactId
from gyrocompass.core.errors import BadInput, nearest
from gyrocompass.core.lineage_graph import (
    HELD_OUT,
    KEPT,
    DocumentCount,
    DocumentFacts,
    Graph,
    Lineage,
    Node,
)
from gyrocompass.core.lineage_tree import render
from gyrocompass.core.store import Store, matching_artifacts
from gyrocompass.core.tables import ArtifactRow, EdgeRow, KnownDocument, ListingRow, OriginRow

__all__ = ["HELD_OUT", "KEPT", "DocumentCount", "DocumentFacts", "Lineage", "Node", "render", "walk"]


_SHOWN = 8
"""How many things of one name an error lists."""


def walk(store: Store, name: str) -> Lineage:
    """Follow an artifact or a document both ways.

    Args:
        store: where to look.
        name: an artifact's id or hash, a document's id, the beginning of one of these, or a document's path
            or the end of it.

    Raises:
        BadInput: nothing or more than one thing has this name.
    """
    with store.database.read() as connection:
        artifact_id, document_id = _resolve(connection, name, where=str(store.root))
        reader = _Reader(connection)
        if artifact_id is not None:
            return reader.of_artifact(artifact_id)
        assert document_id is not None
        return reader.of_document(document_id)


def _resolve(connection: Connection, name: str, *, where: str) -> tuple[ArtifactId | None, str | None]:
    """The one artifact or document that a name means."""
    artifacts = matching_artifacts(connection, name)
    if artifacts == [name]:  # a whole id; the end of a path is looked for in every document
        return name, None
    documents = _matching_documents(connection, name)
    if len(artifacts) + len(documents) == 1:
        return (artifacts[0], None) if artifacts else (None, documents[0][0])
    if not artifacts and not documents:
        best = nearest(name, connection.scalars(select(ArtifactRow.id)))
        hint = f"; did you mean {best}?" if best else ""
        raise BadInput(f"there is no artifact and no document {name!r}{hint}", where=where)
    some = [*artifacts, *(f"{document_id} ({path})" for document_id, path in documents)]
    shown = ", ".join(some[:_SHOWN]) + (", ..." if len(some) > _SHOWN else "")
    raise BadInput(f"{name!r} may be any of: {shown}", where=where, fix="write more of it")


def _matching_documents(connection: Connection, name: str) -> list[tuple[str, str]]:
    """Ids and paths of the documents of that id or path; failing these, of those that begin or end so."""
    listed = select(KnownDocument.id, KnownDocument.path)
    # What documents were derived from may itself be listed nowhere.
    origin = select(OriginRow.origin_id, literal("")).where(
        OriginRow.origin_id.not_in(select(KnownDocument.id))
    )
    path_ends_so = KnownDocument.path.endswith(f"/{name}", autoescape=True)
    exact = (or_(KnownDocument.id == name, KnownDocument.path == name), OriginRow.origin_id == name)
    alike = (
        or_(KnownDocument.id.startswith(name, autoescape=True), path_ends_so),
        OriginRow.origin_id.startswith(name, autoescape=True),
    )
    for of_document, of_origin in (exact, alike):
        matching = union(listed.where(of_document), origin.where(of_origin)).order_by("id").limit(_SHOWN + 1)
        if found := connection.execute(matching).all():
            return [(document_id, path) for document_id, path in found]
    return []


_ARTIFACT_FACTS = ("kind", "code_version", "created_at", "recipe", "counts")


class _Reader:
    """Builds trees from the rows of one reading transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        parents: dict[ArtifactId, dict[str, ArtifactId]] = defaultdict(dict)
        for child_id, role, parent_id in connection.execute(
            select(EdgeRow.child_id, EdgeRow.role, EdgeRow.parent_id)
        ):
            parents[child_id][role] = parent_id
        listing = connection.scalars(select(ArtifactRow.id).where(ArtifactRow.lists_documents))
        self._graph = Graph(parents, frozenset(listing))
        self._children = self._graph.children()

    def of_artifact(self, artifact_id: ArtifactId) -> Lineage:
        """Up to recipes, code and documents; down to everything made from it."""
        up = self._tree("", artifact_id, self._parents_of, set())
        expanded: set[ArtifactId] = set()
        down = tuple(
            self._tree(role, child, self._children_of, expanded)
            for role, child in self._children.get(artifact_id, ())
        )
        return Lineage(up, None, down)

    def of_document(self, document_id: str) -> Lineage:
        """Up to what it was derived from; down to all that saw it."""
        derived = self._derived(document_id)
        listings = self._listings([document_id, *derived])
        keepers = {artifact_id for artifact_id, statuses in listings.items() if KEPT in statuses}
        saw = self._graph.saw(keepers, held_out=True)
        learned = self._graph.saw(keepers, held_out=False)
        expanded: set[ArtifactId] = set()

        def below(artifact_id: ArtifactId) -> Iterable[tuple[str, ArtifactId]]:
            """The children that saw it, of an artifact that did."""
            if artifact_id not in saw:
                return ()
            return [(role, child) for role, child in self._children.get(artifact_id, ()) if child in saw]

        reached = {child for parent in saw for _, child in below(parent)}
        roots = [artifact_id for artifact_id in listings if artifact_id not in reached]
        down = tuple(
            self._tree(_listed_as(listings[root]), root, below, expanded, measured=saw - learned)
            for root in roots
        )
        facts = self._document(document_id)._replace(derived_ids=tuple(derived))
        return Lineage(None, facts, down, saw, learned)

    def _parents_of(self, artifact_id: ArtifactId) -> Iterable[tuple[str, ArtifactId]]:
        return sorted(self._graph.parents.get(artifact_id, {}).items())

    def _children_of(self, artifact_id: ArtifactId) -> Iterable[tuple[str, ArtifactId]]:
        return self._children.get(artifact_id, ())

    def _tree(
        self,
        role: str,
        artifact_id: ArtifactId,
        links_of: Callable[[ArtifactId], Iterable[tuple[str, ArtifactId]]],
        expanded: set[ArtifactId],
        measured: Set[ArtifactId] = frozenset(),
    ) -> Node:
        """The tree below an artifact in one direction; where the graph joins again, links are given once."""
        following = list(links_of(artifact_id))
        again = artifact_id in expanded and bool(following)
        expanded.add(artifact_id)
        links = () if again else tuple(self._tree(*link, links_of, expanded, measured) for link in following)
        return Node(
            role=role,
            id=artifact_id,
            **self._facts.get(artifact_id, {}),
            documents=self._document_counts(artifact_id),
            measured_only=artifact_id in measured,
            links=links,
            again=again,
        )

    @cached_property
    def _facts(self) -> dict[ArtifactId, dict[str, Any]]:
        """Of all artifacts: one query for thousands is faster than one for each of a few dozen."""
        columns = (getattr(ArtifactRow, name) for name in _ARTIFACT_FACTS)
        rows = self._connection.execute(select(ArtifactRow.id, *columns))
        return {name: dict(zip(_ARTIFACT_FACTS, facts, strict=True)) for name, *facts in rows}

    def _document_counts(self, artifact_id: ArtifactId) -> tuple[DocumentCount, ...]:
        if artifact_id not in self._graph.listing:
            return ()
        columns = (KnownDocument.source, ListingRow.slice, ListingRow.status)
        rows = self._connection.execute(
            select(*columns, func.count())
            .join(KnownDocument, KnownDocument.id == ListingRow.document_id)
            .where(ListingRow.artifact_id == artifact_id)
            .group_by(*columns)
            .order_by(*columns)
        )
        return tuple(DocumentCount(source, name, status, count) for source, name, status, count in rows)

    def _document(self, document_id: str, above: tuple[str, ...] = ()) -> DocumentFacts:
        """A document and, recursively, what it was derived from."""
        row = self._connection.execute(
            select(KnownDocument.path, KnownDocument.source).where(KnownDocument.id == document_id)
        ).first()
        path, source = ("", "") if row is None else row
        origin_ids = self._connection.scalars(
            select(OriginRow.origin_id)
            .where(OriginRow.document_id == document_id)
            .order_by(OriginRow.origin_id)
        ).all()
        line = (*above, document_id)
        origins = tuple(self._document(origin, line) for origin in origin_ids if origin not in line)
        return DocumentFacts(document_id, path, source, origins, ())

    def _derived(self, document_id: str) -> list[str]:
        """Everything derived from a document, at any distance."""
        found = {document_id}
        newest = [document_id]
        while newest:
            rows = self._connection.scalars(
                select(OriginRow.document_id).where(OriginRow.origin_id.in_(newest)).distinct()
            )
            newest = [derived for derived in rows if derived not in found]
            found.update(newest)
        return sorted(found - {document_id})

    def _listings(self, document_ids: list[str]) -> dict[ArtifactId, set[str]]:
        """The artifacts that list any of these documents, and with which statuses; oldest first."""
        statuses: dict[ArtifactId, set[str]] = defaultdict(set)
        for artifact_id, status in self._connection.execute(
            select(ListingRow.artifact_id, ListingRow.status)
            .join(ArtifactRow, ArtifactRow.id == ListingRow.artifact_id)
            .where(ListingRow.document_id.in_(document_ids))
            .order_by(ArtifactRow.created_at, ArtifactRow.id)
        ):
            statuses[artifact_id].add(status)
        return statuses


def _listed_as(statuses: Set[str]) -> str:
    """What the listings of a document and its derivatives in one artifact come to."""
    return KEPT if KEPT in statuses else ", ".join(sorted(statuses))
