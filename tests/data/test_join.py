"""Joined windows: every position is what it was, under the names of its own part, in a dataset of its size.

Shape legend: T positions of the joined batch, S segments.
"""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from token_cases import token_datasets, token_rows

from gyrocompass.data.join import join, under
from gyrocompass.data.mixture import Sampler, SamplerConfig
from gyrocompass.data.pack import Packed, cut
from gyrocompass.data.tokens import TokenDataset, TokenRow

LENGTH = 26


def window_of(dataset: TokenDataset, rows: int, seed: int) -> Packed | None:
    if not dataset.n_targets:
        return None
    return next(Sampler(dataset, SamplerConfig(length=LENGTH, rows_per_step=rows, seed=seed)), None)


def named(packed: Packed, dataset: TokenDataset) -> list[tuple[object, ...]]:
    """Each counted position with the names of what it is of, and the units that are together."""
    counted_T = np.flatnonzero(packed.weight_T > 0)
    return [
        (
            int(packed.token_T[t]),
            int(packed.target_T[t]),
            int(packed.position_T[t]),
            float(packed.weight_T[t]),
            int(packed.byte_T[t]),
            dataset.document_ids[packed.document_T[t]],
            dataset.groups[packed.document_T[t]],
            dataset.slice_names[packed.slice_T[t]],
            dataset.source_names[packed.source_T[t]],
        )
        for t in counted_T
    ]


@settings(deadline=None, max_examples=60)
@given(
    datasets=st.lists(token_datasets(), min_size=1, max_size=3),
    rows=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_every_counted_position_is_what_it_was(datasets: list[TokenDataset], rows: int, seed: int) -> None:
    parts = [(packed, data) for data in datasets if (packed := window_of(data, rows, seed)) is not None]
    if not parts:
        return
    packed, data = join(parts)
    assert packed.rows == sum(part.rows for part, _ in parts) and packed.length == LENGTH
    assert named(packed, data) == [entry for part in parts for entry in named(*part)]
    n_segments = [int(part.segment_T.max()) + 1 for part, _ in parts]
    assert sorted(set(packed.segment_T[packed.segment_T >= 0])) == list(range(sum(n_segments)))
    assert data.n_documents == sum(len(set(part.document_T[part.document_T >= 0])) for part, _ in parts)
    assert np.array_equal(
        packed.unit_T[packed.document_T >= 0], data.unit_D[packed.document_T[packed.document_T >= 0]]
    )
    assert list(data.slice_names) == sorted({name for _, own in parts for name in own.slice_names})


@settings(deadline=None, max_examples=30)
@given(rows=token_rows(), seed=st.integers(0, 99))
def test_its_dataset_is_that_of_its_documents(rows: list[TokenRow], seed: int) -> None:
    """What is scored again by itself (a document with a NaN) is cut from the joined dataset."""
    dataset = TokenDataset.of(rows)
    packed = window_of(dataset, 2, seed)
    if packed is None:
        return
    _, joined = join([(packed, dataset), (packed, under("again", dataset))])
    by_name = {row.document_id: row for row in dataset.rows()}
    for row in joined.rows():
        own = by_name[row.document_id]
        assert np.array_equal(row.ids, own.ids) and np.array_equal(row.weights, own.weights)
        assert row.slice.removeprefix("again/") == own.slice
        assert row.source.removeprefix("again/") == own.source
    half = joined.n_documents // 2
    assert [row.slice.startswith("again/") for row in joined.rows()] == [False] * half + [True] * half
    assert cut(joined, LENGTH).n_pieces == 2 * cut(join([(packed, dataset)])[1], LENGTH).n_pieces


def test_columns_that_a_part_lacks_are_nan_there_and_units_stay_apart() -> None:
    def row(name: str, unit: str, **more: object) -> TokenRow:
        return TokenRow(name, "s", "made", [1, 2, 3], [1] * 3, [0.0, 1.0, 1.0], unit=unit, **more)  # type: ignore[arg-type]

    pairs = [row(f"{n}{side}", f"unit-{n}", labels={"side": side}) for n in range(2) for side in (1, 0)]
    texts = TokenDataset.of(pairs)
    samples = TokenDataset.of([row("x", "unit-1", columns={"advantage": [0.0, 0.5, 0.5]})])
    parts = [(window, data) for data in (texts, samples) if (window := window_of(data, 1, 0)) is not None]
    packed, data = join(parts)
    assert set(packed.columns) == {"side", "advantage"}
    own = packed.document_T == data.document_ids.index("x")
    assert own.sum() == 2 and np.isfinite(packed.columns["advantage"][own]).all()
    assert np.isnan(packed.columns["side"][own]).all()
    assert np.isnan(packed.columns["advantage"][~own]).all()
    assert len(set(data.unit_D)) == 3 and data.whole_D.all()
    assert np.isnan(data.columns["advantage"][: texts.n_tokens]).all()
    assert data.labels["side"][:4].tolist() == [1, 0, 1, 0] and np.isnan(data.labels["side"][4])
