"""Lines of a stream in bounded memory: one that is too long is measured and passed over, never held.

stream --bounded_lines--> Line, Line, ...
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from gyrocompass.data.document import EXCERPT_LENGTH

MAX_LINE_BYTES = 64 * 2**20
"""Longer lines are no record: what is read of one becomes several times its size in memory."""

_PIECE_BYTES = 2**20


class Readable(Protocol):
    """What has lines."""

    def readline(self, size: int, /) -> bytes:
        """At most `size` bytes, to the end of the line; nothing at the end of the stream."""


class Line(NamedTuple):
    """One line with its end; of one that is too long only the start, its length and where it stands."""

    number: int
    """From 1."""
    offset: int
    """Of its first byte."""
    data: bytes
    n_bytes: int

    @property
    def is_too_long(self) -> bool:
        """Whether `data` is only its start."""
        return self.n_bytes > len(self.data)


def bounded_lines(stream: Readable, max_bytes: int = MAX_LINE_BYTES) -> Iterator[Line]:
    """The lines of a stream.

    Args:
        stream: anything with `readline(size)`.
        max_bytes: the longest line that is given whole, its end counted.

    >>> import io
    >>> [(line.data, line.n_bytes) for line in bounded_lines(io.BytesIO(b"one two three"), 20)]
    [(b'one two three', 13)]
    """
    number, offset = 0, 0
    while data := stream.readline(max_bytes + 1):
        number += 1
        n_bytes = len(data)
        if n_bytes > max_bytes:
            ended, data = data.endswith(b"\n"), data[: min(EXCERPT_LENGTH, max_bytes)]
            while not ended and (piece := stream.readline(_PIECE_BYTES)):
                n_bytes += len(piece)
                ended = piece.endswith(b"\n")
        yield Line(number, offset, data, n_bytes)
        offset += n_bytes
