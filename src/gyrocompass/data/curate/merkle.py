"""The Merkle root of a data set: one hash that stands for all its documents, and short proofs about each.

    fields(document) = sha256(canonical JSON of all its fields, the content by its hash)
    leaf(document)   = sha256(0x00 || id || fields(document))
    node(l, r)       = sha256(0x01 || l || r)           a node without a neighbour goes up as it is
    root             = sha256(0x02 || number of documents, 8 bytes || the last node over all leaves by id)

Sorted by id, so that the root says which documents there are and nothing about their order, and so that
absence can be shown: two neighbours, one before the id and one after it, with nothing between them. A proof
is about log2(n) hashes and needs nothing but the root to be checked (Laurie et al. 2013, RFC 6962, whose
prefixes 0 and 1 keep a leaf from passing for a node).
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from gyrocompass.core.config import canonical_json
from gyrocompass.data.document import DOCUMENT_SCHEMA

Hash = bytes
"""32 bytes of sha256."""

_CONTENT = {"text", "prompt", "rejected", "gold", "messages", "steps"}
LEAF_FIELDS = tuple(name for name in DOCUMENT_SCHEMA.names if name not in _CONTENT)
"""What a leaf covers: `content_hash` stands for what is learned from."""


class Leaf(NamedTuple):
    """A document in the tree."""

    id: str
    fields: Hash

    @property
    def hash(self) -> Hash:
        """Its node, the lowest one."""
        return hashlib.sha256(b"\0" + self.id.encode() + self.fields).digest()


class Proof(NamedTuple):
    """That a leaf is at a place among all leaves of a root."""

    leaf: Leaf
    place: int
    n_leaves: int
    siblings: tuple[Hash, ...]
    """What it is hashed with on the way to the root, from below."""


class Absence(NamedTuple):
    """That no leaf has an id: the leaves on both sides of it, one of them None at an end."""

    id: str
    before: Proof | None
    after: Proof | None


def leaf(row: Mapping[str, Any]) -> Leaf:
    """The leaf of a row of `DOCUMENT_SCHEMA` (the content itself need not be there)."""
    fields = {name: row.get(name) for name in LEAF_FIELDS}
    fields["labels"] = dict(fields["labels"] or {})
    return Leaf(row["id"], hashlib.sha256(canonical_json(fields).encode()).digest())


def merkle_root(leaves: Iterable[Leaf]) -> Hash:
    """The root of leaves in any order.

    >>> merkle_root([]).hex()[:8]
    '4322fd2b'
    """
    level = [entry.hash for entry in sorted(leaves)]
    n_leaves = len(level)
    while len(level) > 1:
        level = _above(level)
    return _crowned(level[0] if level else b"", n_leaves)


def prove(leaves: Sequence[Leaf], document_id: str) -> Proof | Absence:
    """A proof that a document is there, or that it is not.

    Args:
        leaves: all of them, sorted by id.
        document_id: 16 hex digits.
    """
    place = bisect_left(leaves, document_id, key=lambda entry: entry.id)
    if place < len(leaves) and leaves[place].id == document_id:
        return _proof(leaves, place)
    before = _proof(leaves, place - 1) if place > 0 else None
    after = _proof(leaves, place) if place < len(leaves) else None
    return Absence(document_id, before, after)


def holds(proof: Proof | Absence, root: Hash) -> bool:
    """Whether a proof is right about a root."""
    if isinstance(proof, Absence):
        return _is_absent(proof, root)
    return _root_of(proof) == root


def _is_absent(proof: Absence, root: Hash) -> bool:
    before, after = proof.before, proof.after
    if before is None and after is None:
        return root == merkle_root([])
    if any(side is not None and not holds(side, root) for side in (before, after)):
        return False
    if before is None or after is None:
        side = before or after
        assert side is not None
        at_the_end = side.place == (0 if before is None else side.n_leaves - 1)
        return at_the_end and (proof.id < side.leaf.id if before is None else side.leaf.id < proof.id)
    adjacent = before.n_leaves == after.n_leaves and before.place + 1 == after.place
    return adjacent and before.leaf.id < proof.id < after.leaf.id


def _crowned(top: Hash, n_leaves: int) -> Hash:
    """The root: the last node, and over how many leaves it stands."""
    return hashlib.sha256(b"\x02" + n_leaves.to_bytes(8, "big") + top).digest()


def _above(level: Sequence[Hash]) -> list[Hash]:
    """The level above: neighbours hashed together."""
    pairs = [
        hashlib.sha256(b"\x01" + left + right).digest()
        for left, right in zip(level[::2], level[1::2], strict=False)
    ]
    return pairs + ([level[-1]] if len(level) % 2 else [])


def _proof(leaves: Sequence[Leaf], place: int) -> Proof:
    siblings: list[Hash] = []
    level, at = [entry.hash for entry in leaves], place
    while len(level) > 1:
        if at ^ 1 < len(level):
            siblings.append(level[at ^ 1])
        level, at = _above(level), at // 2
    return Proof(leaves[place], place, len(leaves), tuple(siblings))


def _root_of(proof: Proof) -> Hash | None:
    """The root that a proof leads to; None where it has too few hashes or too many."""
    node, at, width = proof.leaf.hash, proof.place, proof.n_leaves
    siblings = list(proof.siblings)
    while width > 1:
        if at ^ 1 < width:
            if not siblings:
                return None
            other = siblings.pop(0)
            left, right = (other, node) if at % 2 else (node, other)
            node = hashlib.sha256(b"\x01" + left + right).digest()
        at, width = at // 2, (width + 1) // 2
    return None if siblings or at else _crowned(node, proof.n_leaves)
