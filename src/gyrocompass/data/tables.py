"""Files of records: JSON lines (also gzip-compressed), Parquet, and the folder of a saved `datasets` table.

    file --> (record, place) --read_record--> Document | Quarantined | Skipped

A line or row that is broken by itself is quarantined and reading goes on. A file that is broken as a whole (a
gzip or Parquet file cut short) fails, since nobody knows how much of it is missing.

The `datasets` folder is read with pyarrow alone: `state.json` lists Arrow stream files. A selection that is
only kept as indices into them is refused rather than read wrongly.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from gyrocompass.core.errors import BadInput, did_you_mean
from gyrocompass.data.document import EXCERPT_LENGTH, Document, Quarantined, Record, Skipped
from gyrocompass.data.lines import Line, bounded_lines
from gyrocompass.data.records import ContentField, Malformed, Place, RecordOptions, read_record

_DATASET, _DATASET_DICT = "state.json", "dataset_dict.json"
_SAVE_AGAIN = "save it again with save_to_disk() of `datasets`"


def is_dataset_folder(folder: Path) -> bool:
    """Whether `save_to_disk` of `datasets` wrote this folder."""
    return (folder / _DATASET).is_file() or (folder / _DATASET_DICT).is_file()


def read_jsonl(path: Path, options: RecordOptions, source: str) -> Iterator[Record]:
    """Read a file with one JSON object a line, in UTF-8, gzip-compressed if its name ends with .gz.

    A line of more than `MAX_LINE_BYTES` is quarantined without being held.

    Raises:
        BadInput: the compressed file is cut short or damaged.
    """
    number = 0
    try:
        with _open(path) as file:
            for line in bounded_lines(file):
                number = line.number
                yield jsonl_record(line, options, path.as_posix(), source)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise BadInput(
            f"the compressed file is damaged: {error}",
            where=f"{path}, after line {number}",
            fix="copy or download it again",
        ) from error


def _open(path: Path) -> BinaryIO | gzip.GzipFile:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def jsonl_record(
    line: Line,
    options: RecordOptions,
    path: str,
    source: str,
    shape: Callable[[object], object] = lambda raw: raw,
) -> Record:
    """One line as a document, or why it is none.

    Args:
        line: see `bounded_lines`.
        options: see `read_record`.
        path: of its file.
        source: the name of its collection.
        shape: brings records that other tools wrote into the house's shape; its `Malformed` is the reason.
    """
    place = Place(path, line.number, source, line.offset, line.n_bytes)
    if not line.data.strip():
        return Skipped(f"{path}:{line.number}", "empty line", source)
    excerpt = line.data[:EXCERPT_LENGTH].decode("utf-8", "replace")
    if line.is_too_long:
        return place.quarantined(f"a line of {line.n_bytes:,} bytes, which is too long", excerpt)
    try:
        raw = json.loads(line.data.decode("utf-8-sig" if line.number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        return place.quarantined(f"not UTF-8: {error.reason} at byte {error.start}", excerpt)
    except (ValueError, RecursionError) as error:
        return place.quarantined(f"not JSON: {error}", excerpt)
    try:
        return read_record(shape(raw), options, place)
    except Malformed as reason:
        return place.quarantined(str(reason), raw)


def read_parquet(
    path: Path, options: RecordOptions, source: str, file: IO[bytes] | None = None
) -> Iterator[Record]:
    """Read the rows of a Parquet file, counted from 1.

    Args:
        path: its place.
        options: see `read_record`.
        source: the name of its collection.
        file: its bytes, where they do not lie at `path`, such as those of an archive's member; seekable.

    Raises:
        BadInput: it is not a Parquet file, or damaged, or has no column that holds content.
    """
    try:
        with pq.ParquetFile(file or path) as table:
            _check_columns(table.schema_arrow.names, options, path)
            yield from _table_records(table.iter_batches(batch_size=1024), options, path, source)
    except (pa.ArrowException, OSError) as error:
        raise BadInput(
            f"the Parquet file cannot be read: {error}", where=path, fix="copy or write it again"
        ) from error


def read_dataset(folder: Path, split: str | None, options: RecordOptions, source: str) -> Iterator[Record]:
    """Read what `save_to_disk` of `datasets` wrote: a dataset, or one split of a dict of them.

    Raises:
        BadInput: it is no such folder, a split is missing or unknown, or its files cannot be read.
    """
    folder = _split_folder(folder, split)
    state = _object(folder / _DATASET)
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise BadInput(
            "the dataset is a selection by indices",
            where=folder,
            fix="call flatten_indices() before save_to_disk()",
        )
    row = 0
    for name in _data_files(state, folder):
        path = folder / name
        try:
            with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as reader:
                _check_columns(reader.schema.names, options, folder)
                for batch in reader:
                    yield from _table_records([batch], options, folder, source, row)
                    row += batch.num_rows
        except (pa.ArrowException, OSError) as error:
            raise BadInput(
                f"the Arrow file cannot be read: {error}", where=path, fix="save it again"
            ) from error


def _object(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise BadInput(f"the file cannot be read as JSON: {error}", where=path, fix=_SAVE_AGAIN) from error
    if not isinstance(value, dict):
        raise BadInput("the file holds no JSON object", where=path, fix=_SAVE_AGAIN)
    return value


def _data_files(state: dict[str, Any], folder: Path) -> list[str]:
    """The names of the Arrow files; a name that leads out of the folder is not one that `datasets` writes."""
    entries = state.get("_data_files")
    if not isinstance(entries, list):
        raise BadInput("there is no list _data_files", where=folder / _DATASET, fix=_SAVE_AGAIN)
    names = [entry.get("filename") if isinstance(entry, dict) else entry for entry in entries]
    for name in names:
        if not _is_plain_name(name):
            raise BadInput(
                f"_data_files names {name!r}, which is not a file of this folder",
                where=folder / _DATASET,
                fix=_SAVE_AGAIN,
            )
    return [str(name) for name in names]


def _is_plain_name(name: object) -> bool:
    """Whether it is the name of something that can only lie in the folder itself, on any system."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\:\0")


def _split_folder(folder: Path, split: str | None) -> Path:
    """The folder of the dataset itself."""
    if (folder / _DATASET_DICT).is_file():
        splits = _object(folder / _DATASET_DICT).get("splits")
        if not isinstance(splits, list) or not all(map(_is_plain_name, splits)):
            raise BadInput("there is no list of splits", where=folder / _DATASET_DICT, fix=_SAVE_AGAIN)
        if split is None:
            raise BadInput(
                f"the folder holds several splits: {', '.join(splits)}",
                where=folder,
                fix="name one with `split`",
            )
        if split not in splits:
            raise BadInput(f"there is no split {split}{did_you_mean(split, splits)}", where=folder)
        folder = folder / split
        if not (folder / _DATASET).is_file():
            raise BadInput(f"the split {split} has no {_DATASET}", where=folder, fix=_SAVE_AGAIN)
        return folder
    if not (folder / _DATASET).is_file():
        raise BadInput(
            "not a folder that save_to_disk() of `datasets` wrote",
            where=folder,
            fix="give the folder with state.json or dataset_dict.json",
        )
    if split is not None:
        raise BadInput(
            f"the folder is one dataset, without a split {split}", where=folder, fix="leave out `split`"
        )
    return folder


def _check_columns(columns: Sequence[str], options: RecordOptions, where: Path) -> None:
    asked: tuple[ContentField, ...] = ("text", "messages", "prompt", "completion", "chosen")
    names = {name: options.fields.get(name, name) for name in asked}
    if not set(columns) & set(names.values()):
        raise BadInput(
            f"none of the columns {', '.join(names.values())}; there are: {', '.join(columns)}",
            where=where,
            fix="name the column with `fields`, such as {text: content}",
        )


def _table_records(
    batches: Any, options: RecordOptions, path: Path, source: str, before: int = 0
) -> Iterator[Document | Quarantined]:
    for batch in batches:
        for number, raw in enumerate(_rows(batch), before + 1):
            place = Place(path.as_posix(), number, source)
            if isinstance(raw, UnicodeDecodeError):
                yield place.quarantined(f"not UTF-8: {raw.reason}", raw.object[:EXCERPT_LENGTH])
            else:
                yield read_record(raw, options, place)
        before += batch.num_rows


def _rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | UnicodeDecodeError]:
    """Rows as mappings; a row whose text is not UTF-8 as the error."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for index in range(batch.num_rows):
            try:
                yield batch.slice(index, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield error
