"""Streams that unpack what is compressed, counted against what a file may cost.

    compressed stream --unpacked--> stream of the same file's own bytes, or Damaged | Refused with an offset

A bomb is known by two numbers of the file on the disk: all that it unpacks to, archives in archives counted
at each level, is at most `unpacked_bytes`, and past the first `free_bytes` at most `ratio` times its size.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

import pyarrow as pa
from pydantic import PositiveFloat, PositiveInt

from gyrocompass.core.config import Config
from gyrocompass.data.lines import MAX_LINE_BYTES

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_MIB = 2**20


class IngestLimits(Config):
    """What one file may cost; whatever is over a limit is quarantined."""

    document_bytes: PositiveInt = 64 * _MIB
    """Of a file, a page or a member of an archive that becomes one document."""
    line_bytes: PositiveInt = MAX_LINE_BYTES
    """Of a line of records or of a log."""
    unpacked_bytes: PositiveInt = 64 * 1024 * _MIB
    """Of all that one file on the disk unpacks to."""
    ratio: PositiveFloat = 200.0
    """Unpacked bytes for each byte on the disk. Text packs 3 to 10 times, logs up to 50 times."""
    free_bytes: PositiveInt = 64 * _MIB
    """What any file may unpack to, whatever the ratio."""
    members: PositiveInt = 1_000_000
    """Of all archives in one file on the disk."""
    depth: PositiveInt = 3
    """Archives inside of each other."""
    html_seconds: PositiveFloat = 10.0
    """For the text of one page."""
    html_bytes: PositiveInt = 16 * _MIB
    """Of one page."""


class Stopped(Exception):  # noqa: N818
    """Reading a stream came to an end before the stream did.

    Args:
        reason: why.
        offset: the byte, in the stream as it is unpacked, up to which it was read.
    """

    def __init__(self, reason: str, offset: int | None = None) -> None:
        super().__init__(reason)
        self.reason, self.offset = reason, offset


class Damaged(Stopped):
    """The bytes are not what their format says: cut short, changed, or of another format."""


class Refused(Stopped):
    """The bytes may be sound, and reading on would cost more than the limits allow."""


@dataclass
class Budget:
    """What is left for one file on the disk; every stream that unpacks a part of it takes from it."""

    limits: IngestLimits
    packed_bytes: int
    unpacked_bytes: int = 0
    members: int = 0

    def take(self, n_bytes: int, offset: int | None = None) -> None:
        """Count unpacked bytes.

        Raises:
            Refused: there are too many.
        """
        self.unpacked_bytes += n_bytes
        limits = self.limits
        if self.unpacked_bytes > limits.unpacked_bytes:
            raise Refused(f"it unpacks to more than {limits.unpacked_bytes:,} bytes", offset)
        if self.unpacked_bytes > max(limits.free_bytes, limits.ratio * self.packed_bytes):
            raise Refused(
                f"it unpacks to more than {limits.ratio:g} times its {self.packed_bytes:,} bytes, "
                "as bombs do",
                offset,
            )

    def take_member(self, offset: int | None = None) -> None:
        """Count a member of an archive.

        Raises:
            Refused: there are too many.
        """
        self.members += 1
        if self.members > self.limits.members:
            raise Refused(f"it holds more than {self.limits.members:,} files", offset)


class _Lent:
    """A stream that is not closed by who reads it."""

    closed = False

    def __init__(self, stream: IO[bytes]) -> None:
        self.read = stream.read

    def close(self) -> None:
        """Leave it open."""


def _zstd(stream: IO[bytes]) -> IO[bytes]:
    return pa.CompressedInputStream(pa.PythonFile(_Lent(stream), mode="r"), "zstd")  # type: ignore[no-any-return]


COMPRESSIONS: dict[str, Callable[[Any], Any]] = {
    ".gz": lambda stream: gzip.GzipFile(fileobj=stream, mode="rb"),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _zstd,
}
"""What unpacks a file with this suffix."""

_DAMAGE = (
    EOFError,
    zlib.error,
    lzma.LZMAError,
    gzip.BadGzipFile,
    pa.ArrowException,
    tarfile.TarError,
    zipfile.BadZipFile,
)


class Unpacked(io.RawIOBase):
    """What a compressed stream unpacks to.

    Args:
        stream: the packed bytes, or a member of an archive.
        suffix: of `COMPRESSIONS`; "" for a stream that is not compressed.
        budget: what its bytes are counted against; None where they were counted before.
    """

    def __init__(self, stream: IO[bytes], suffix: str, budget: Budget | None) -> None:
        opened = COMPRESSIONS[suffix](stream) if suffix else stream
        # What is there before a break is given first: read() would lose it to the error.
        self._read = getattr(opened, "read1", opened.read)
        self._budget = budget
        self.offset = 0

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        """Fill the buffer.

        Raises:
            Damaged: the packed bytes are.
            Refused: the budget is spent.
        """
        view = memoryview(buffer).cast("B")
        try:
            data: bytes = self._read(len(view))
        except _DAMAGE as error:
            raise Damaged(_why(error), self.offset) from error
        except OSError as error:
            if error.errno is not None:  # the disk's own fault
                raise
            raise Damaged(_why(error), self.offset) from error
        view[: len(data)] = data
        self.offset += len(data)
        if self._budget is not None:
            self._budget.take(len(data), self.offset)
        return len(data)


def buffered(raw: Unpacked, n_bytes: int = _MIB) -> io.BufferedReader:
    """The stream with lines; it holds no more than its `n_bytes`, where these are known to be few."""
    return io.BufferedReader(raw, min(max(n_bytes, 1), _MIB))


def _why(error: Exception) -> str:
    return f"the data are {'cut short' if isinstance(error, EOFError) else 'damaged or cut short'} ({error})"


def whole(stream: IO[bytes], max_bytes: int) -> bytes:
    """All of a stream that becomes one document.

    Raises:
        Refused: there is more.
        Damaged: see `Unpacked`.
    """
    data = stream.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise Refused(f"more than {max_bytes:,} bytes, which is too long for one document", 0)
    return data
