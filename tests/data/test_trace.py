"""The trace leads from every position of every step to the token that was there."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gyrocompass.core.errors import BadInput
from gyrocompass.data import trace
from gyrocompass.data.mixture import Sampler, SamplerConfig
from gyrocompass.data.tokens import TokenDataset, TokenRow, write_tokens
from gyrocompass.data.trace import find_piece, read_token, write_trace


def rows_of(lengths: list[int]) -> list[TokenRow]:
    chance = np.random.default_rng(len(lengths))
    return [
        TokenRow(
            f"{number:016x}",
            "ab"[number % 2],
            "files",
            chance.integers(0, 1000, length).tolist(),
            chance.integers(0, 5, length).tolist(),
            [1.0] * length,
        )
        for number, length in enumerate(lengths)
    ]


@settings(deadline=None, max_examples=25)
@given(
    lengths=st.lists(st.integers(2, 30), min_size=1, max_size=20),
    length=st.integers(3, 12),
    rows_per_step=st.integers(1, 4),
    epochs=st.integers(1, 2),
    skipped=st.sets(st.integers(1, 5), max_size=2),
    group_rows=st.sampled_from([1, 7, 1000]),
)
def test_every_position_is_the_token_that_was_read(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    length: int,
    rows_per_step: int,
    epochs: int,
    skipped: set[int],
    group_rows: int,
) -> None:
    folder = tmp_path_factory.mktemp("trace")
    rows = rows_of(lengths)
    write_tokens(folder, rows, row_group_tokens=40, shard_tokens=90)
    config = SamplerConfig(length=length, rows_per_step=rows_per_step, epochs=epochs, seed=3)
    windows = [w for n, w in enumerate(Sampler(TokenDataset.open(folder), config), 1) if n not in skipped]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(trace, "_GROUP_ROWS", group_rows)
        data = TokenDataset.open(folder)
        write_trace(folder / "t.parquet", data, folder, config, steps=len(windows), skipped=skipped)
    for step, window in enumerate(windows, 1):
        for position in range(0, len(window.token_T), 5):
            piece = find_piece(folder / "t.parquet", step, position)
            document = int(window.document_T[position])
            if document < 0:
                assert piece is None
                continue
            assert piece is not None
            found, row = read_token(folder, piece), rows[document]
            assert (found.document_id, found.slice) == (row.document_id, row.slice)
            assert found.id == window.token_T[position]
            assert window.target_T[position] in (found.target_id, -100)
            before = int(np.sum(row.byte_counts[: found.token]))
            assert found.bytes == (before, before + row.byte_counts[found.token])
            assert found.target_bytes[1] - found.target_bytes[0] == window.byte_T[position]
    for step in (0, len(windows) + 1):
        with pytest.raises(BadInput, match=f"there is no step {step}"):
            find_piece(folder / "t.parquet", step, 0)
