"""Arrow columns from texts and from numpy, built from their buffers.

`pyarrow.array` and `to_numpy` do the same, but import pandas wherever it is installed: 50 MB and a third of a
second, more than a step needs for itself.

Shape legend: D documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from gyrocompass.core.errors import BadInput


def string_column(texts: Sequence[str]) -> pa.Array:
    """Texts as large_string.

    Raises:
        BadInput: a text holds a surrogate, or is none.
    """
    raw = []
    for row, text in enumerate(texts):
        try:
            raw.append(text.encode())
        except UnicodeEncodeError as error:
            raise BadInput(
                f"a text holds a surrogate, which is no character: {text[error.start : error.end]!r}",
                where=f"row {row}",
                fix="repair the encoding before looking for duplicates",
            ) from error
        except AttributeError as error:
            raise BadInput(
                f"a text is of type {type(text).__name__}", where=f"row {row}", fix="give texts"
            ) from error
    begin_D1 = np.cumsum([0, *map(len, raw)], dtype=np.int64)
    buffers = [None, pa.py_buffer(begin_D1), pa.py_buffer(b"".join(raw))]
    return pa.Array.from_buffers(pa.large_string(), len(raw), buffers)


def bytes_column(values: Sequence[bytes], width: int) -> pa.Array:
    """Values of one width as fixed-size binary."""
    return pa.Array.from_buffers(pa.binary(width), len(values), [None, pa.py_buffer(b"".join(values))])


def column(value_D: npt.NDArray[Any], null_D: npt.NDArray[np.bool_] | None = None) -> pa.Array:
    """Numbers or truth values of numpy, some of them null.

    >>> column(np.array([1, 2]), np.array([False, True])).to_pylist(), column(np.array([True])).to_pylist()
    ([1, None], [True])
    """
    kind = pa.from_numpy_dtype(value_D.dtype)
    raw = np.packbits(value_D, bitorder="little") if value_D.dtype == np.bool_ else value_D
    valid = None if null_D is None else pa.py_buffer(np.packbits(~null_D, bitorder="little"))
    return pa.Array.from_buffers(kind, len(value_D), [valid, pa.py_buffer(np.ascontiguousarray(raw))])


def numbers(array: pa.Array, missing: float | None = None) -> npt.NDArray[Any]:
    """The numbers of a column, without a copy where none is null.

    Args:
        array: of integers or floats.
        missing: what stands for a null.

    >>> numbers(column(np.array([1, 2, 3]), np.array([False, True, False]))[1:], -1).tolist()
    [-1, 3]
    """
    valid, raw = array.buffers()
    dtype = np.dtype(array.type.to_pandas_dtype())
    if raw is None:
        return np.zeros(len(array), dtype)
    value_D = np.frombuffer(raw, dtype, len(array), array.offset * dtype.itemsize)
    if not array.null_count:
        return value_D
    bits = np.unpackbits(np.frombuffer(valid, np.uint8), bitorder="little")
    return np.where(bits[array.offset : array.offset + len(array)] == 1, value_D, dtype.type(missing))
