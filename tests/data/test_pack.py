import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from token_cases import token_datasets

from gyrocompass.data.pack import IGNORE_INDEX, Packed, assemble, cut, pack
from gyrocompass.data.tokens import TokenDataset, TokenRow

PADDED_COLUMNS = ("segment_T", "document_T", "slice_T", "source_T")


def packed(dataset: TokenDataset, length: int) -> Packed:
    pieces = cut(dataset, length)
    return assemble(dataset, pieces, pack(pieces.length_P, length), length)


def test_ignore_index_is_the_one_of_the_loss() -> None:
    from gyrocompass.loss import signal

    assert IGNORE_INDEX == signal.IGNORE_INDEX


def test_packed_has_the_fields_of_a_batch() -> None:
    from dataclasses import fields

    from gyrocompass.loss.signal import Batch

    assert [*Packed._fields] == [field.name for field in fields(Batch)]


@settings(deadline=None, max_examples=150)
@given(token_datasets(), st.integers(1, 30))
def test_every_counted_target_is_predicted_exactly_once(dataset: TokenDataset, length: int) -> None:
    batch = packed(dataset, length)
    counted = batch.weight_T > 0
    places = np.flatnonzero(dataset.weight_N > 0)
    order = np.argsort(batch.target_T[counted])  # ids are unique and grow with the place
    np.testing.assert_array_equal(batch.target_T[counted][order], dataset.id_N[places])
    np.testing.assert_array_equal(batch.weight_T[counted][order], dataset.weight_N[places])
    np.testing.assert_array_equal(batch.byte_T[counted][order], dataset.byte_N[places])
    document_N = np.repeat(np.arange(dataset.n_documents), np.diff(dataset.offset_D))
    np.testing.assert_array_equal(batch.document_T[counted][order], document_N[places])
    np.testing.assert_array_equal(batch.slice_T[counted][order], dataset.slice_D[document_N[places]])
    np.testing.assert_array_equal(batch.source_T[counted][order], dataset.source_D[document_N[places]])


@settings(deadline=None, max_examples=100)
@given(token_datasets(), st.integers(1, 30))
def test_layout(dataset: TokenDataset, length: int) -> None:
    batch = packed(dataset, length)
    assert batch.rows * length == len(batch.token_T)
    columns = batch[: batch._fields.index("length")]
    assert [column.dtype.name for column in columns] == ["int64"] * 7 + ["float32", "int64", "int64"]
    padding = batch.segment_T < 0
    for name in PADDED_COLUMNS:
        np.testing.assert_array_equal(getattr(batch, name) < 0, padding, err_msg=name)
    assert not batch.weight_T[padding].any() and not batch.byte_T[padding].any()
    np.testing.assert_array_equal(batch.target_T == IGNORE_INDEX, batch.weight_T == 0)
    for row in range(batch.rows):
        cells = slice(row * length, (row + 1) * length)
        segment, position, token = batch.segment_T[cells], batch.position_T[cells], batch.token_T[cells]
        assert not (np.diff(padding[cells].astype(int)) < 0).any(), "padding stands at the end"
        starts = np.flatnonzero(np.diff(segment, prepend=-2))
        np.testing.assert_array_equal(np.flatnonzero(position == 0), starts)
        for start, stop in zip(starts, [*starts[1:], length], strict=True):
            np.testing.assert_array_equal(position[start:stop], np.arange(stop - start))
            if segment[start] >= 0:  # ids are consecutive: a segment is one run of its document
                np.testing.assert_array_equal(np.diff(token[start:stop]), 1)
    present = np.unique(batch.segment_T[~padding])
    np.testing.assert_array_equal(present, np.arange(len(present)))
    predicting = np.unique(batch.segment_T[batch.weight_T > 0])
    np.testing.assert_array_equal(predicting, present, err_msg="each segment predicts something")


@settings(deadline=None, max_examples=60)
@given(token_datasets(), st.integers(1, 30), st.integers(1, 5))
def test_split_equals_assembling_the_rows_alone(dataset: TokenDataset, length: int, rows: int) -> None:
    pieces = cut(dataset, length)
    all_rows = pack(pieces.length_P, length)
    parts = list(assemble(dataset, pieces, all_rows, length).split(rows))
    assert len(parts) == -(-len(all_rows) // rows)
    for index, part in enumerate(parts):
        alone = assemble(dataset, pieces, all_rows[index * rows : (index + 1) * rows], length)
        for name, got, expected in zip(Packed._fields, part, alone, strict=True):
            np.testing.assert_array_equal(got, expected, err_msg=name)


def test_a_share_without_rows_is_empty() -> None:
    dataset = TokenDataset.of([TokenRow("d", "a", "s", [1, 2, 3], [0, 1, 1], [0, 1, 1])])
    share = packed(dataset, 4).take(1, 2)
    assert share.rows == 0 and share.length == 4 and share.segment_T.dtype == np.int64


@settings(deadline=None, max_examples=150)
@given(st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(1, n), max_size=60))))
def test_pack_is_best_fit_decreasing(case: tuple[int, list[int]]) -> None:
    length, sizes = case
    free: list[int] = []  # the textbook algorithm: the fullest row that fits
    for size in sorted(sizes, reverse=True):
        fitting = [row for row, left in enumerate(free) if left >= size]
        if fitting:
            free[min(fitting, key=lambda row: free[row])] -= size
        else:
            free.append(length - size)
    rows = pack(np.array(sizes, np.int64), length)
    assert sorted(piece for row in rows for piece in row) == list(range(len(sizes)))
    assert sorted(length - sum(sizes[piece] for piece in row) for row in rows) == sorted(free)


def test_a_piece_that_predicts_nothing_is_left_out() -> None:
    row = TokenRow("d", "a", "s", list(range(9)), [0] * 9, [0, 0, 0, 0, 0, 0, 1, 0, 0])
    pieces = cut(TokenDataset.of([row]), 4)  # inputs 0-3 predict 1-4, inputs 4-7 predict 5-8
    assert pieces.start_P.tolist() == [4] and pieces.length_P.tolist() == [4]
