"""Web archives: what was fetched, when, and from where.

    stream --captures--> Capture, Capture, ... | Damaged

Read are responses with the status 200, resources, and conversions (the plain texts of WET files). What else a
WARC holds (requests, metadata, other statuses, images) is named as left out. The stream is unpacked before
(`streams`), so that a break in it has an offset; a record that is shorter than it says is a break too.

The format is read by warcio, which takes chunked and compressed transfers apart.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import IO, NamedTuple

from gyrocompass.core.errors import MissingDependency
from gyrocompass.data.ingest.streams import Damaged

WARC_SUFFIXES = (".warc", ".wet")

_READ_TYPES = ("response", "resource", "conversion")


class Capture(NamedTuple):
    """A record of a WARC file."""

    url: str
    offset: int
    """Of the record, in the file as it is unpacked."""
    time: datetime | None
    media_type: str
    """In small letters, without parameters."""
    charset: str | None
    """As the HTTP header declares it."""
    body: bytes
    left_out: str
    """Why its body was not read; "" where it was."""


def captures(stream: IO[bytes], max_bytes: int) -> Iterator[Capture]:
    """The records of a WARC file, in its order.

    Args:
        stream: its bytes, unpacked.
        max_bytes: of a body; more of one is not read, and `body` is then one byte longer than this.

    Raises:
        Damaged: it is no WARC file from some offset on, or is cut short.
        MissingDependency: warcio is not installed.
    """
    try:
        from warcio.archiveiterator import ArchiveIterator
        from warcio.exceptions import ArchiveLoadFailed
    except ImportError as error:
        raise MissingDependency("warcio", extra="ingest", needed_for="a WARC file") from error
    counted = _Counted(stream)
    records = ArchiveIterator(counted)
    before = None
    while True:
        offset = records.offset
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # it prints what err_count counts
                record = next(records, None)
        except ArchiveLoadFailed as error:
            raise Damaged(f"not a record of a WARC file ({str(error).strip()})", offset) from error
        except (ValueError, AttributeError) as error:  # what it raises over half a header
            raise Damaged("a record's headers are cut short or damaged", offset) from error
        # What is left of a record that was read to its end is what the file lacks.
        if before is not None and getattr(before.raw_stream, "limit", 1) > 0:
            raise Damaged("the file is cut short within a record", counted.offset)
        if records.err_count:
            raise Damaged("a record is not as long as it says", offset)
        if record is None:
            if before is not None and counted.tail.strip(b"\r\n"):
                raise Damaged("the file is cut short within a record", counted.offset)
            return
        before = record
        yield _capture(record, records.offset, max_bytes)


def _capture(record: object, offset: int, max_bytes: int) -> Capture:
    from warcio.recordloader import ArcWarcRecord

    assert isinstance(record, ArcWarcRecord)
    headers, http = record.rec_headers, record.http_headers
    url = headers.get_header("WARC-Target-URI") or f"record-at-{offset}"
    content_type = (http if http is not None else headers).get_header("Content-Type") or ""
    media_type, _, parameters = content_type.partition(";")
    status = http.get_statuscode() if http is not None else "200"
    left_out, body = "", b""
    if record.rec_type not in _READ_TYPES:
        left_out = f"a {record.rec_type} record"
    elif status != "200":
        left_out = f"the status {status}"
    else:
        body = record.content_stream().read(max_bytes + 1)
    return Capture(
        url.strip("<>"),
        offset,
        _time(headers.get_header("WARC-Date")),
        media_type.strip().lower(),
        _charset(parameters),
        body,
        left_out,
    )


def _time(date: str | None) -> datetime | None:
    try:
        return datetime.fromisoformat(date or "").astimezone(UTC)
    except ValueError:
        return None


def _charset(parameters: str) -> str | None:
    """The charset among a content type's parameters.

    >>> _charset(' charset="koi8-r"; x=y')
    'koi8-r'
    """
    for parameter in parameters.split(";"):
        name, _, value = parameter.strip().partition("=")
        if name.lower() == "charset":
            return value.strip("\"' ") or None
    return None


class _Counted:
    """A stream that knows how much of it was read, and what came last."""

    def __init__(self, stream: IO[bytes]) -> None:
        # What is there before a break is given first: read() would lose it to the error.
        self._read = getattr(stream, "read1", stream.read)
        self.offset = 0
        self.tail = b""

    def read(self, size: int = -1) -> bytes:
        data: bytes = self._read(size)
        self.offset += len(data)
        self.tail = (self.tail + data[-4:])[-4:]
        return data

    def tell(self) -> int:
        return self.offset
