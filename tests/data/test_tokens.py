from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from token_cases import token_rows

from gyrocompass.core.errors import BadInput
from gyrocompass.data.tokens import TokenDataset, TokenRow, write_tokens


@settings(deadline=None, max_examples=40)
@given(rows=token_rows(), row_group_tokens=st.integers(1, 80), shard_tokens=st.integers(1, 200))
def test_what_is_written_opens_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, rows: list[TokenRow], row_group_tokens: int, shard_tokens: int
) -> None:
    folder = tmp_path_factory.mktemp("tokens")
    counts = write_tokens(folder, rows, row_group_tokens=row_group_tokens, shard_tokens=shard_tokens)
    expected, got = TokenDataset.of(rows), TokenDataset.open(folder)
    for name in ("id_N", "byte_N", "weight_N", "offset_D", "slice_D", "source_D"):
        left, right = getattr(expected, name), getattr(got, name)
        np.testing.assert_array_equal(left, right, err_msg=name)
        assert left.dtype == right.dtype
    assert got.groups == tuple(row.group or row.document_id for row in rows)
    assert (expected.document_ids, expected.groups, expected.slice_names, expected.source_names) == (
        got.document_ids,
        got.groups,
        got.slice_names,
        got.source_names,
    )
    assert (counts.documents, counts.tokens, counts.targets, counts.bytes) == (
        len(rows),
        sum(len(row.ids) for row in rows),
        sum(weight > 0 for row in rows for weight in row.weights[1:]),
        sum(sum(row.byte_counts) for row in rows),
    )
    assert sum(got.targets_by_slice().values()) == got.n_targets == counts.targets


def test_shards_are_split_by_tokens(tmp_path: Path) -> None:
    rows = [TokenRow(f"d{k}", "a", "s", [1, 2, 3], [0, 1, 1], [0, 1, 1]) for k in range(10)]
    write_tokens(tmp_path, rows, row_group_tokens=3, shard_tokens=12)
    assert len(list(tmp_path.glob("tokens-*.parquet"))) == 3
    assert TokenDataset.open(tmp_path).document_ids == tuple(f"d{k}" for k in range(10))


def test_files_from_before_groups_were_kept(tmp_path: Path) -> None:
    write_tokens(tmp_path, [TokenRow(f"d{k}", "a", "s", [1, 2], [0, 1], [0, 1], "g") for k in range(3)])
    path = tmp_path / "tokens-00000.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["group"]), path)
    assert TokenDataset.open(tmp_path).groups == ("d0", "d1", "d2")


def test_no_documents(tmp_path: Path) -> None:
    assert write_tokens(tmp_path, []).documents == 0
    dataset = TokenDataset.open(tmp_path)
    assert dataset.n_documents == dataset.n_targets == 0 and dataset.targets_by_slice() == {}


def test_a_folder_without_tokens_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no tokens here"):
        TokenDataset.open(tmp_path)
