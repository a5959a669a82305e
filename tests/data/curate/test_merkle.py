from __future__ import annotations

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from gyrocompass.data.curate.merkle import Absence, Leaf, Proof, holds, leaf, merkle_root, prove
from gyrocompass.data.document import Document, document_row

IDS = st.lists(st.integers(0, 2**16 - 1).map(lambda n: f"{n:016x}"), max_size=40, unique=True)


def leaves_of(ids: list[str]) -> list[Leaf]:
    return sorted(Leaf(name, hashlib.sha256(name.encode()).digest()) for name in ids)


@given(ids=IDS, asked=st.integers(0, 2**16 - 1).map(lambda n: f"{n:016x}"), order=st.randoms())
def test_presence_and_absence_are_proved_and_nothing_else(ids: list[str], asked: str, order: object) -> None:
    leaves = leaves_of(ids)
    root = merkle_root(leaves)
    shuffled = list(leaves)
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    assert merkle_root(shuffled) == root
    for name in [*ids[:5], asked]:
        proof = prove(leaves, name)
        assert isinstance(proof, Proof) == (name in ids)
        assert holds(proof, root)
        assert not holds(proof, hashlib.sha256(root).digest())
        if isinstance(proof, Proof):
            assert len(proof.siblings) <= max(1, len(ids)).bit_length()
            assert not holds(proof._replace(leaf=proof.leaf._replace(id=f"{0:016x}x")), root)
            assert not holds(proof._replace(n_leaves=proof.n_leaves + 1), root)


@given(ids=IDS.filter(lambda ids: len(ids) > 2))
def test_a_document_that_is_there_cannot_be_proved_absent(ids: list[str]) -> None:
    leaves = leaves_of(ids)
    root = merkle_root(leaves)
    for place in range(1, len(leaves) - 1):
        before, after = prove(leaves, leaves[place - 1].id), prove(leaves, leaves[place + 1].id)
        assert isinstance(before, Proof) and isinstance(after, Proof)
        assert not holds(Absence(leaves[place].id, before, after), root)
        assert not holds(Absence(leaves[place].id, None, after), root)
        assert not holds(Absence(leaves[place].id, before, None), root)
        # Nor with neighbours that call themselves something else.
        renamed = after._replace(leaf=after.leaf._replace(id=leaves[place].id + "0"), place=place)
        assert not holds(Absence(leaves[place].id, before, renamed), root)


def test_a_leaf_covers_every_field() -> None:
    document = Document(kind="text", text="x", path="a", source="s", slice="t")
    changes: list[dict[str, object]] = [
        {},
        {"licence": "MIT"},
        {"weight": 2.0},
        {"slice": "u"},
        {"content_hash": "0"},
        {"labels": [("a", 1.0)]},
    ]
    rows = [document_row(document) | changed for changed in changes]
    assert len({leaf(row).fields for row in rows}) == len(rows)
