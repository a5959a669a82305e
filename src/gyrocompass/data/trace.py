"""The trace of a run: which tokens of which documents stood where in each of its steps.

    tokens, sampler config, windows passed over --write_trace--> trace.parquet    a row for each packed piece
    trace.parquet, step, position --find_piece--> Piece --read_token--> TracedToken: document, byte span

The order of the data is a function of tokens and config, so the trace is written after the run by drawing the
order again, without the model; a step is a window that was not passed over. A position counts through the
rows of a
step: row * length + column. A row of the trace says which shard of the tokens, and which row of it, its piece
is of.

Both ways back are logarithmic in the size of the data: the trace is sorted by step and position, so the
footer's bounds lead to one row group of it, and the shard's footer to one row group of the tokens, whatever
the number of either.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from gyrocompass.core.errors import BadInput
from gyrocompass.data.mixture import Sampler, SamplerConfig
from gyrocompass.data.tokens import TokenDataset

TRACE = "trace.parquet"
TRACE_SCHEMA = pa.schema(
    [
        ("step", pa.int32()),  # from 1, as in metrics
        ("begin", pa.int32()),  # the position of its first input token
        ("length", pa.int32()),
        ("shard", pa.int32()),
        ("row", pa.int32()),  # of the shard: its document
        ("start", pa.int32()),  # of the document's tokens, the first that is read
    ]
)
_GROUP_ROWS = 2**16

Int64Array = npt.NDArray[np.int64]


class Piece(NamedTuple):
    """A run of a document's tokens in a step."""

    shard: int
    row: int
    token: int
    """The token asked for, counted from 0 in its document."""


class TracedToken(NamedTuple):
    """One position of a step: the token that was read there, and the one that was to be predicted."""

    document_id: str
    source: str
    slice: str
    token: int
    """Which token of the document it is, counted from 0."""
    n_tokens: int
    """Tokens of the document."""
    id: int
    bytes: tuple[int, int]
    """Where it begins and ends in the text that was tokenised, in bytes; equal for special tokens."""
    target_id: int
    target_bytes: tuple[int, int]
    target_weight: float
    """0: context alone, nothing was learned from predicting it."""


def write_trace(
    path: Path,
    data: TokenDataset,
    tokens: Path,
    config: SamplerConfig,
    *,
    steps: int,
    skipped: Collection[int] = (),
) -> None:
    """Draw the order of a run again and write it down.

    Args:
        path: the file to write.
        data: the tokens that were read.
        tokens: the folder they were opened from.
        config: of the sampler that read them.
        steps: how many steps the run took.
        skipped: windows that were passed over, counted from 1.
    """
    rows = np.array([pq.read_metadata(shard).num_rows for shard in _shards(tokens)], np.int64)
    before = np.cumsum(rows) - rows
    waiting: list[pa.RecordBatch] = []
    with pq.ParquetWriter(path, TRACE_SCHEMA, compression="zstd") as writer:

        def flush() -> None:
            if waiting:
                writer.write_table(pa.Table.from_batches(waiting).combine_chunks())
                waiting.clear()

        for step, pieces in enumerate(_pieces(data, config, steps, skipped), 1):
            begin, length, document, start = pieces
            shard = np.searchsorted(before, document, side="right") - 1
            # A shard without rows begins where the next one does; the last of them holds the document.
            columns = (np.full(len(begin), step), begin, length, shard, document - before[shard], start)
            arrays = [pa.array(column.astype(np.int32)) for column in columns]
            waiting.append(pa.RecordBatch.from_arrays(arrays, schema=TRACE_SCHEMA))
            if sum(batch.num_rows for batch in waiting) >= _GROUP_ROWS:
                flush()
        flush()


def find_piece(path: Path, step: int, position: int) -> Piece | None:
    """What stood at a position of a step; None at padding.

    Raises:
        BadInput: the run has no such step.
    """
    with pq.ParquetFile(path) as file:
        n_groups = file.num_row_groups
        last = _steps(file, n_groups - 1).max if n_groups else 0
        if not 1 <= step <= last:
            raise BadInput(f"there is no step {step}", where=path, fix=f"give one from 1 to {last}")
        first = bisect_left(range(n_groups), step, key=lambda group: _steps(file, group).max)
        while first < n_groups and _steps(file, first).min <= step:
            table = file.read_row_group(first)
            columns = {name: table[name].to_numpy() for name in TRACE_SCHEMA.names}
            low, high = np.searchsorted(columns["step"], [step, step + 1])
            at = low + int(np.searchsorted(columns["begin"][low:high], position, side="right")) - 1
            if at >= low and position < columns["begin"][at] + columns["length"][at]:
                token = int(columns["start"][at]) + position - int(columns["begin"][at])
                return Piece(int(columns["shard"][at]), int(columns["row"][at]), token)
            first += 1
    return None


def _steps(file: pq.ParquetFile, group: int) -> pq.Statistics:
    """The first and the last step in a row group."""
    return file.metadata.row_group(group).column(0).statistics


def read_token(tokens: Path, piece: Piece) -> TracedToken:
    """The token of a piece, from the one row group that holds it.

    Args:
        tokens: the folder of the tokens that the trace is of.
        piece: see `find_piece`.
    """
    with pq.ParquetFile(_shards(tokens)[piece.shard]) as file:
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        ends = np.cumsum(sizes)
        group = int(np.searchsorted(ends, piece.row, side="right"))
        names = ["document_id", "source", "slice", "ids", "byte_counts", "weights"]
        table = file.read_row_group(group, columns=names)
        row = table.slice(piece.row - int(ends[group]) + sizes[group], 1).to_pylist()[0]
    ends_in_text = np.cumsum([0, *row["byte_counts"]]).tolist()

    def span(token: int) -> tuple[int, int]:
        return ends_in_text[token], ends_in_text[token + 1]

    return TracedToken(
        row["document_id"],
        row["source"],
        row["slice"],
        piece.token,
        len(row["ids"]),
        row["ids"][piece.token],
        span(piece.token),
        row["ids"][piece.token + 1],
        span(piece.token + 1),
        row["weights"][piece.token + 1],
    )


def _shards(tokens: Path) -> list[Path]:
    return sorted(tokens.glob("tokens-*.parquet"))


def _pieces(
    data: TokenDataset, config: SamplerConfig, steps: int, skipped: Collection[int]
) -> Iterator[tuple[Int64Array, Int64Array, Int64Array, Int64Array]]:
    """For each step the pieces in it, by position: begin, length, document, first token of the document."""
    sampler = Sampler(data, config)
    window = taken = 0
    while taken < steps and (rows := sampler.next_rows()):
        window += 1
        if window in skipped:
            continue
        taken += 1
        piece_S = np.array([piece for row in rows for piece in row], np.int64)
        length_S = sampler.pieces.length_P[piece_S]
        row_S = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
        used_before_S = np.cumsum(length_S) - length_S
        first_of_row = np.searchsorted(row_S, np.arange(len(rows)))
        begin_S = row_S * config.length + used_before_S - used_before_S[first_of_row][row_S]
        document_S = sampler.pieces.document_P[piece_S]
        yield begin_S, length_S, document_S, sampler.pieces.start_P[piece_S] - data.offset_D[document_S]
