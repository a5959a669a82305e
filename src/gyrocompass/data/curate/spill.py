"""Arrays that grow: in memory up to a limit that they share, beyond it in temporary files without a name.

    with Spill(limit_bytes) as spill:
        keys = spill.array(np.uint64)
        keys.append(values) ... keys.read(start, stop)

When the limit is passed, every array moves to a file of its own and stays there. A file is gone when the
spill is closed or the process ends, however it ends. Reading does not map files: what was read is what is
resident.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from io import RawIOBase
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from gyrocompass.core.errors import GyroError

Array = npt.NDArray[Any]


class Spill:
    """The limit, and the files.

    Args:
        limit_bytes: how much all arrays together may hold in memory.
        folder: where files are made; None: where the system puts temporary ones.
    """

    def __init__(self, limit_bytes: int, folder: str | None = None) -> None:
        self.limit_bytes, self.folder = limit_bytes, folder
        self.held_bytes = 0
        self._arrays: list[SpillArray] = []
        self._stack = ExitStack()

    def array(self, dtype: npt.DTypeLike) -> SpillArray:
        """A new array without elements."""
        array = SpillArray(self, np.dtype(dtype))
        self._arrays.append(array)
        return array

    def open(self) -> RawIOBase:
        """A new file, closed with the spill."""
        try:
            return self._stack.enter_context(tempfile.TemporaryFile(dir=self.folder, buffering=0))
        except OSError as error:
            raise self.refused(error) from error

    def refused(self, error: OSError) -> GyroError:
        """What to say when a file cannot be written."""
        return GyroError(
            f"cannot keep an index on disk: {error.strerror}",
            where=self.folder or tempfile.gettempdir(),
            fix="make room there, name another folder in TMPDIR, or raise the limit of memory",
        )

    def hold(self, n_bytes: int) -> None:
        """Count what an array holds more than before; beyond the limit all move to files."""
        self.held_bytes += n_bytes
        if self.held_bytes > self.limit_bytes:
            for array in self._arrays:
                array.move()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._arrays.clear()


class SpillArray:
    """One array; see `Spill.array`."""

    def __init__(self, spill: Spill, dtype: np.dtype[Any]) -> None:
        self._spill, self._dtype = spill, dtype
        self._held: list[Array] = []
        self._file: RawIOBase | None = None
        self.size = 0

    def append(self, values: Array) -> None:
        """Add values at the end."""
        values = np.ascontiguousarray(values, self._dtype)
        self.size += len(values)
        if self._file is None:
            self._held.append(values)
            self._spill.hold(values.nbytes)
        else:
            self._write(values)

    def read(self, start: int = 0, stop: int | None = None) -> Array:
        """The values from start to before stop, as an array of their own."""
        stop = self.size if stop is None else stop
        if self._file is None:
            if len(self._held) != 1:
                self._held = [np.concatenate([np.empty(0, self._dtype), *self._held])]
            return self._held[0][start:stop]
        width = self._dtype.itemsize
        raw = os.pread(self._file.fileno(), (stop - start) * width, start * width)
        while len(raw) < (stop - start) * width:  # one call reads at most 2 GiB
            raw += os.pread(self._file.fileno(), (stop - start) * width - len(raw), start * width + len(raw))
        return np.frombuffer(raw, self._dtype)

    def move(self) -> None:
        """To a file, unless it is in one."""
        if self._file is None:
            self._file = self._spill.open()
            for values in self._held:
                self._write(values)
                self._spill.held_bytes -= values.nbytes
            self._held = []

    def _write(self, values: Array) -> None:
        assert self._file is not None
        rest = values.view(np.uint8).data
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise self._spill.refused(error) from error
