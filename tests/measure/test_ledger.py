"""The ledger: law 2 (every token once, slices add up to the total), merging, exact round trips, refusals."""

from __future__ import annotations

import math
from dataclasses import astuple
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gyrocompass.core.errors import BadInput, GyroError
from gyrocompass.measure.ledger import FIELDS, Ledger, Sums

SLICES = ["code/library", "code/tests", "prose/docs"]
SOURCES = ["stdlib", "files"]
DOCUMENTS = [f"document-{index}" for index in range(7)]

Token = tuple[int, int, float, float, int, bool, float]  # document, source, nll, weight, bytes, top1, entropy
tokens = st.lists(
    st.tuples(
        st.integers(0, len(DOCUMENTS) - 1),
        st.integers(0, len(SOURCES) - 1),
        st.floats(0.0, 40.0),
        st.sampled_from([0.0, 0.5, 1.0, 3.0]),
        st.integers(0, 9),
        st.booleans(),
        st.floats(0.0, 9.0),
    ),
    max_size=60,
)


def ledger_of(rows: list[Token]) -> Ledger:
    ledger = Ledger()
    if not rows:
        return ledger
    document, source, nll, weight, byte, top1, entropy = (
        np.array(column) for column in zip(*rows, strict=True)
    )
    ledger.add_tokens(
        {
            "slice": (document % len(SLICES), SLICES),
            "source": (source, SOURCES),
            "document": (document, DOCUMENTS),
        },
        nll,
        weight_N=weight,
        byte_N=byte,
        top1_N=top1,
        entropy_N=entropy,
    )
    return ledger


def close(left: Ledger, right: Ledger) -> None:
    """Counts exactly, float sums up to rounding."""
    assert left.dimensions() == right.dimensions()
    for dimension in left.dimensions():
        for (name, mine), (other_name, other) in zip(
            left.items(dimension), right.items(dimension), strict=True
        ):
            assert name == other_name
            assert (mine.count, mine.bytes, mine.top1) == (other.count, other.bytes, other.top1)
            assert astuple(mine) == pytest.approx(astuple(other), rel=1e-12)


@settings(deadline=None, max_examples=60)
@given(tokens)
def test_every_counted_token_is_counted_once_in_each_dimension(rows: list[Token]) -> None:
    ledger = ledger_of(rows)
    counted = [row for row in rows if row[3] > 0]
    assert ledger.total.count == len(counted)
    assert ledger.total.bytes == sum(row[4] for row in counted)
    assert ledger.total.top1 == sum(row[5] for row in counted)
    assert ledger.total.top1_count == ledger.total.entropy_count == len(counted)
    assert ledger.total.value == pytest.approx(math.fsum(row[2] for row in counted))
    assert ledger.total.value_sq == pytest.approx(math.fsum(row[2] ** 2 for row in counted))
    assert ledger.total.weight == pytest.approx(math.fsum(row[3] for row in counted))
    for dimension in ("slice", "source", "document"):
        parts = [sums for _, sums in ledger.items(dimension)]
        added = (
            [math.fsum(column) for column in zip(*map(astuple, parts), strict=True)] if parts else [0.0] * 9
        )
        assert added == pytest.approx(list(astuple(ledger.total)), rel=1e-12)


@settings(deadline=None, max_examples=40)
@given(tokens, st.lists(st.integers(0, 60), max_size=4), st.randoms(use_true_random=False))
def test_merging_the_parts_in_any_order_is_the_whole(rows: list[Token], cuts: list[int], random) -> None:
    edges = sorted({0, len(rows), *(min(cut, len(rows)) for cut in cuts)})
    parts = [ledger_of(rows[start:end]) for start, end in pairwise(edges)]
    random.shuffle(parts)
    merged = Ledger()
    for part in parts:
        merged.merge(part)
    close(merged, ledger_of(rows))


@settings(deadline=None, max_examples=40)
@given(tokens, tokens)
def test_merging_commutes_exactly_and_an_empty_ledger_changes_nothing(
    left: list[Token], right: list[Token]
) -> None:
    one, other = ledger_of(left), ledger_of(right)
    one.merge(ledger_of(right))
    other.merge(ledger_of(left))
    assert one == other
    one.merge(Ledger())
    assert one == other


@settings(deadline=None, max_examples=40)
@given(tokens, st.floats(-1e9, 1e9), st.floats(0, 1e9))
def test_parquet_is_an_exact_round_trip(rows: list[Token], value: float, weight: float) -> None:
    ledger = ledger_of(rows)
    ledger.add_objective("z_loss", value, weight, 3)
    again = Ledger.from_bytes(ledger.to_bytes())
    assert again == ledger
    for dimension in ledger.dimensions():
        assert list(again.items(dimension)) == list(ledger.items(dimension))
    again.add_objective("z_loss", 1.0, 1.0, 1)
    assert again != ledger


def test_a_saved_ledger_is_read_back(tmp_path: Path) -> None:
    ledger = ledger_of([(0, 0, 0.1 + 0.2, 1.0, 3, True, 1 / 3)])
    ledger.save(tmp_path / "ledger.parquet")
    assert Ledger.load(tmp_path / "ledger.parquet") == ledger


def test_a_file_that_is_not_a_ledger_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "ledger.parquet"
    with pytest.raises(BadInput, match=r"ledger\.parquet"):
        Ledger.load(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(BadInput, match=r"ledger\.parquet"):
        Ledger.load(path)
    with pytest.raises(BadInput, match="not a ledger"):
        Ledger.from_table(pa.table({"dimension": ["total"]}))


def test_merging_a_ledger_with_itself_doubles_it() -> None:
    ledger = ledger_of([(document % 7, 0, 1.0, 1.0, 2, False, 0.5) for document in range(20)])
    ledger.merge(ledger)
    assert ledger.total.count == 40
    assert ledger.sums("document", DOCUMENTS[0]).count == 6


def test_one_name_at_two_indices_is_one_row() -> None:
    ledger = Ledger()
    ledger.add_tokens({"document": ([0, 1, 1], ["same", "same"])}, [1.0, 2.0, 4.0])
    assert ledger.sums("document", "same").value == 7.0
    assert ledger.names("document") == ["same"]


def test_a_document_is_kept_apart_by_slice_and_summed_over_slices() -> None:
    ledger = Ledger()
    ledger.add_tokens({"slice": ([0, 1, 1], SLICES), "document": ([4, 4, 5], DOCUMENTS)}, [1.0, 2.0, 4.0])
    names, sums = ledger.columns("document", "code/tests")
    assert names == ["document-4", "document-5"]
    assert sums[:, FIELDS.index("value")].tolist() == [2.0, 4.0]
    assert ledger.sums("document", "document-4").value == 3.0
    assert ledger.columns("document")[1][:, FIELDS.index("value")].tolist() == [3.0, 4.0]


def test_what_was_not_measured_is_not_a_zero() -> None:
    ledger = Ledger()
    ledger.add_tokens({}, [1.0, 2.0])
    ledger.add_tokens({}, [1.0], top1_N=[True], entropy_N=[0.5])
    assert ledger.total == Sums(3, 3.0, 4.0, 6.0, 0, 1, 1, 1, 0.5)


def test_padding_may_carry_a_negative_tag_and_a_nan() -> None:
    ledger = Ledger()
    ledger.add_tokens({"slice": ([0, -1], SLICES)}, [1.0, math.nan], weight_N=[1.0, 0.0])
    assert ledger.total.count == 1
    assert ledger.names("slice") == ["code/library"]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_counted_nan_names_its_document_and_adds_nothing(bad: float) -> None:
    ledger = Ledger()
    tags = {"slice": ([0, 0, 1], SLICES), "document": ([2, 3, 4], DOCUMENTS)}
    with pytest.raises(GyroError, match=r"1 of 3 tokens(.|\n)*document-3"):
        ledger.add_tokens(tags, [1.0, bad, 1.0])
    assert ledger == Ledger()
    with pytest.raises(GyroError, match="document-4"):
        ledger.add_tokens(tags, [1.0, 1.0, 1.0], entropy_N=[0.0, 0.0, bad])
    with pytest.raises(GyroError, match="z_loss"):
        ledger.add_objective("z_loss", bad, 1.0, 1)
    assert ledger == Ledger()


def test_objectives_add_up_and_stay_out_of_the_total() -> None:
    ledger = Ledger()
    ledger.add_objective("nll", 3.0, 2.0, 2)
    ledger.add_objective("nll", 4.0, 1.0, 1)
    assert ledger.sums("objective", "nll") == Sums(3, 3.0, 7.0, 0.0, 0, 0, 0, 0, 0.0)
    assert ledger.total.count == 0


def test_a_name_that_never_occurred_has_zero_sums() -> None:
    assert Ledger().sums("slice", "nowhere") == Sums(0, 0, 0, 0, 0, 0, 0, 0, 0)
