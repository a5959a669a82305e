from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gyrocompass.data.curate.containment import ContainmentStep, containment
from gyrocompass.data.curate.planted_duplicates import Planted, plant, shingle_set
from gyrocompass.data.curate.step import columns_of

EVERYTHING = ContainmentStep(sample=1, most_common=1000, most_partners=1000, shingle_words=2, least=0.01)

TEXTS = st.lists(st.lists(st.sampled_from("abcdefgh"), max_size=9).map(" ".join), max_size=8)


def rows_by_id(texts: list[str], ids: list[str], step: ContainmentStep) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in containment(texts, ids, step).to_pylist()}


@settings(deadline=None)
@given(TEXTS, st.randoms(use_true_random=False))
def test_shares_are_those_of_sets_and_order_does_not_matter(texts: list[str], draw: Any) -> None:
    ids = [f"{number:02d}" for number in range(len(texts))]
    sets = {name: shingle_set(text, 2) for name, text in zip(ids, texts, strict=True)}
    rows = rows_by_id(texts, ids, EVERYTHING)
    for name, own in sets.items():
        row = rows[name]
        shares = {other: len(own & sets[other]) / len(own) for other in ids if other != name and own}
        both = [sets[row[column]] for column in ("partner", "second") if row[column] is not None]
        if both:
            assert row["containment"] == pytest.approx(shares[row["partner"]])
            assert row["covered"] == pytest.approx(len(own & frozenset().union(*both)) / len(own))
        if row["redundant"]:  # its partners are then chosen among those that stay
            continue
        assert row["containment"] == pytest.approx(max(shares.values(), default=0.0))
        for other in shares if both else ():
            share_of_two = len(own & (sets[row["partner"]] | sets[other])) / len(own)
            assert share_of_two <= row["covered"] + 0.0100001
    order = draw.sample(range(len(texts)), len(texts))
    assert rows_by_id([texts[n] for n in order], [ids[n] for n in order], EVERYTHING) == rows


@settings(deadline=None)
@given(TEXTS, st.sampled_from([0.5, 0.9, 1.0]))
def test_what_is_redundant_is_covered_by_what_stays(texts: list[str], threshold: float) -> None:
    ids = [f"{number:02d}" for number in range(len(texts))]
    rows = rows_by_id(texts, ids, EVERYTHING.model_copy(update={"threshold": threshold}))
    for row in rows.values():
        if row["redundant"]:
            assert row["covered"] >= threshold - 1e-6
            partners = [row[column] for column in ("partner", "second") if row[column] is not None]
            assert partners and not any(rows[other]["redundant"] for other in partners)


@pytest.fixture(scope="module")
def planted() -> Planted:
    texts = []
    for path in sorted(Path(json.__file__).parents[1].glob("*.py"))[:80]:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        texts += ["\n".join(lines[start : start + 60]) for start in (0, 60, 120) if len(lines) > start + 50]
    return plant(texts, share=0.5)


def test_spliced_halves_are_found_in_both(planted: Planted) -> None:
    ids = [str(number) for number in range(len(planted.texts))]
    rows = rows_by_id(planted.texts, ids, ContainmentStep())
    spliced = [n for n, kind in enumerate(planted.kinds) if kind == "spliced"]
    found = [rows[ids[n]] for n in spliced]
    assert len(spliced) > 10
    assert sum(row["covered"] >= 0.9 for row in found) >= 0.95 * len(found)
    assert sum(row["redundant"] for row in found) >= 0.9 * len(found)
    shorter = [rows[ids[n]] for n, kind in enumerate(planted.kinds) if kind == "shorter"]
    assert shorter and all(row["containment"] >= 0.95 for row in shorter)
    alone = [
        rows[ids[n]] for n in range(len(ids))
        if planted.kinds[n] == "base" and all(n not in origins for origins in planted.origins)
    ]  # fmt: skip
    # A standard library has copies of its own: what is said to be redundant has to be.
    sets = dict(zip(ids, (shingle_set(text, 5) for text in planted.texts), strict=True))
    for row in alone:
        partners = [sets[row[column]] for column in ("partner", "second") if row[column] is not None]
        own = sets[row["id"]]
        assert not row["redundant"] or len(own & frozenset().union(*partners)) >= 0.9 * len(own)
    assert sum(row["redundant"] for row in alone) <= 0.1 * len(alone)


def test_the_step_has_its_columns_before_there_are_documents() -> None:
    assert list(columns_of(ContainmentStep(), {})) == [
        "partner",
        "containment",
        "second",
        "covered",
        "redundant",
    ]
