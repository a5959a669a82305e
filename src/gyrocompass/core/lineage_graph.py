"""The graph of artifacts, the rule for what saw a document, and the trees that walking it gives.

    an artifact that lists documents saw the ones it kept, and what those were derived from
    any other artifact saw what its parents saw

So a listing is authoritative: below a data set that was split, only the side that holds the document goes on.
An artifact that was made from a parent in a role that begins with `held_out` was measured on it; what that
parent saw was seen, but not learned from. `Lineage.learned` is what remains when those edges are left out, so
that a held-out document is never said to have been trained on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Set
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

from gyrocompass.core.artifact import ArtifactId

HELD_OUT = "held_out"
"""Roles that begin so mean: measured on, not learned from."""
KEPT = "kept"
"""The status of a listed document that is in the artifact."""


class DocumentCount(NamedTuple):
    """How many documents of one source, slice and status an artifact lists."""

    source: str
    slice: str
    status: str
    documents: int


class Node(NamedTuple):
    """An artifact in a tree of lineage."""

    role: str
    """How it hangs from the one above it: the role of that edge, or how it lists the document walked from."""
    id: ArtifactId
    documents: tuple[DocumentCount, ...]
    measured_only: bool
    """From a document: whether it saw it as held-out only."""
    links: tuple[Node, ...]
    """Going up, what it was made from; going down, what was made from it."""
    again: bool
    """Whether its links are left out because they stand elsewhere in the tree."""
    kind: str | None = None
    """None for an artifact that this store does not know; then the rest is empty too."""
    code_version: str = ""
    created_at: str = ""
    recipe: Mapping[str, Any] = MappingProxyType({})
    counts: Mapping[str, int | float] = MappingProxyType({})


class DocumentFacts(NamedTuple):
    """A document, and its relatives."""

    id: str
    path: str
    source: str
    origins: tuple[DocumentFacts, ...]
    """What it was derived from."""
    derived_ids: tuple[str, ...]
    """What was derived from it, at any distance."""


class Lineage(NamedTuple):
    """What an artifact or a document came from, and what came from it."""

    artifact: Node | None
    """The artifact walked from, its links going up; None for a document."""
    document: DocumentFacts | None
    """The document walked from; None for an artifact."""
    down: tuple[Node, ...]
    """What was made from the artifact; or what lists the document, and what saw it through those."""
    saw: frozenset[ArtifactId] = frozenset()
    """From a document: every artifact that saw it."""
    learned: frozenset[ArtifactId] = frozenset()
    """From a document: those that saw it otherwise than as held-out."""


@dataclass(frozen=True)
class Graph:
    """What was made from what."""

    parents: Mapping[ArtifactId, Mapping[str, ArtifactId]]
    """By child, then role."""
    listing: Set[ArtifactId]
    """The artifacts that list documents."""

    def children(self) -> dict[ArtifactId, list[tuple[str, ArtifactId]]]:
        """By parent: each role and child, in order."""
        children: dict[ArtifactId, list[tuple[str, ArtifactId]]] = defaultdict(list)
        for child in sorted(self.parents):
            for role, parent in sorted(self.parents[child].items()):
                children[parent].append((role, child))
        return children

    def saw(self, keepers: Collection[ArtifactId], *, held_out: bool) -> frozenset[ArtifactId]:
        """The artifacts that saw a document.

        Args:
            keepers: the artifacts that list the document, or one derived from it, as kept.
            held_out: whether to count what was seen as held-out only.
        """
        children = self.children()
        found = set(keepers)
        waiting = list(found)
        while waiting:
            for role, child in children.get(waiting.pop(), ()):
                counted = held_out or not role.startswith(HELD_OUT)
                if counted and child not in self.listing and child not in found:
                    found.add(child)
                    waiting.append(child)
        return frozenset(found)
