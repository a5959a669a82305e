"""Archives, member by member, without unpacking anything to the disk by its own name.

    Blob --unpack--> Blob, Blob, ... | Quarantined | Skipped

    dumps.tar.xz!/2024/chats.zip!/a.jsonl.gz    what is read: a.jsonl, of a zip of a tar

A member's path that leads out of its archive (`..`, an absolute one, a drive) is quarantined, and so is a
link out of it; a link that stays inside is left out, since what it leads to is a member too. An archive in
an archive is copied to a temporary file without a name, as it is read twice: once for its licence files,
which often come last, and once for all the rest. Members that are encrypted, sparse, devices or pipes cannot
be read.

A stream that breaks gives what stands before the break, then one quarantined record with the offset; an
archive without its end mark was cut short at a member's end, which nothing else would show.
"""

from __future__ import annotations

import io
import stat
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import IO

from gyrocompass.core.errors import GyroError
from gyrocompass.data.document import Evidence, Quarantined, Skipped
from gyrocompass.data.ingest import evidence
from gyrocompass.data.ingest.evidence import LicenceFiles, is_licence_file
from gyrocompass.data.ingest.streams import (
    COMPRESSIONS,
    Budget,
    Damaged,
    Refused,
    Stopped,
    Unpacked,
    buffered,
)

TAR_SUFFIXES = {".tar": "", ".tgz": ".gz", ".tbz2": ".bz2", ".tbz": ".bz2", ".txz": ".xz"} | {
    f".tar{suffix}": suffix for suffix in COMPRESSIONS
}
"""Names of tar archives, and the suffix of how each is compressed."""
ZIP_SUFFIXES = (".zip", ".whl", ".epub")

_HEADER_BYTES = 2**20
"""Most bytes of a tar header that gives a long name or other properties."""
_DIRECTORY_BYTES = 256 * 2**20
"""Most bytes of a zip archive's directory, which is read into memory."""
_SPOOLED_BYTES = 8 * 2**20
_PIECE_BYTES = 2**20
_LICENCE_BYTES = 4096


@dataclass(frozen=True)
class Blob:
    """A file's bytes, wherever it lies; its stream is to be read before the next one is asked for."""

    path: str
    """With ! after each archive that it is in."""
    name: str
    """Its own name, less the suffix of how it is compressed: what kind of file it is."""
    stream: IO[bytes]
    source: str
    file_hash: str
    """sha256 of the file on the disk."""
    time: datetime | None = None
    """As an archive, a capture or a log says it."""
    licences: LicenceFiles = field(default_factory=LicenceFiles)
    """Those of its tree or archive."""
    depth: int = 0
    """How many archives it is in."""

    def quarantined(
        self, reason: str, offset: int | None = None, n_bytes: int | None = None, path: str | None = None
    ) -> Quarantined:
        """It, or a member of it, as what cannot be used."""
        return Quarantined(path or self.path, None, reason, "", self.source, offset=offset, n_bytes=n_bytes)


Found = Blob | Quarantined | Skipped


def unpack(blob: Blob, budget: Budget) -> Iterator[Found]:
    """What a file holds: itself, if it is no archive; else its members, and theirs.

    Args:
        blob: any file.
        budget: of the file on the disk that it lies in.
    """
    name = blob.name.lower()
    tar = next((suffix for suffix in TAR_SUFFIXES if name.endswith(suffix)), None)
    packed = next((suffix for suffix in COMPRESSIONS if name.endswith(suffix)), None)
    try:
        if tar is not None or name.endswith(ZIP_SUFFIXES):
            if blob.depth >= budget.limits.depth:
                yield blob.quarantined(f"archives in archives, more than {budget.limits.depth} deep")
                return
            with seekable(blob) as file:
                if tar is None:
                    yield from _zip(blob, file, budget)
                else:
                    yield from _tar(blob, file, TAR_SUFFIXES[tar], budget)
        elif packed is not None:
            stream = Unpacked(blob.stream, packed, budget)
            inner = replace(blob, name=blob.name[: -len(packed)], stream=buffered(stream))
            yield from unpack(inner, budget)
        else:
            yield blob
    except Damaged as error:
        yield blob.quarantined(error.reason, error.offset)


@contextmanager
def seekable(blob: Blob) -> Iterator[IO[bytes]]:
    """The blob as a file that can be read in any order; what lies in an archive is copied."""
    if blob.depth == 0 and blob.stream.seekable():
        yield blob.stream
        return
    with tempfile.SpooledTemporaryFile(_SPOOLED_BYTES) as copy:
        try:
            while piece := blob.stream.read(_PIECE_BYTES):
                copy.write(piece)
        except OSError as error:
            raise GyroError(
                f"what lies in an archive cannot be copied: {error.strerror or error}",
                where=f"{blob.path}, to {tempfile.gettempdir()}",
                fix="make room there, or name another place in TMPDIR",
            ) from error
        yield copy


def _member(blob: Blob, name: str) -> str:
    return f"{blob.path}!/{name}"


def _leads_out(name: str) -> bool:
    r"""Whether a member's name is the path of something else than a file inside.

    >>> [_leads_out(name) for name in ("a/../../b", "/etc/passwd", "..\\x", "C:/x", "a/b..c", "")]
    [True, True, True, True, False, True]
    """
    parts = name.replace("\\", "/").split("/")
    return not name or name.startswith(("/", "\\")) or ".." in parts or ":" in parts[0] or "\0" in name


def _is_hidden(name: str) -> bool:
    """Whether a file or one of its folders is hidden; such files are left out wherever they lie."""
    return any(part.startswith(".") and part != "." for part in PurePosixPath(name).parts)


# --- tar ---


class _Header(tarfile.TarInfo):
    """A header that does not fill the memory with a name; one class for each archive that is read."""

    has_ended = False
    """Whether the end mark was read."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError:
            cls.has_ended = len(buf) == tarfile.BLOCKSIZE and not bytes(buf).strip(b"\0")
            raise
        long = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
        is_long = header.type in (*long, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
        if is_long and header.size > _HEADER_BYTES:
            raise Refused(f"a tar header of {header.size:,} bytes")
        return header


def _tar_members(
    file: IO[bytes], compression: str, budget: Budget
) -> Iterator[tuple[tarfile.TarInfo, Unpacked | None]]:
    """The members of a tar archive in their order, with their bytes where they are plain files.

    Raises:
        Damaged: at the break, or at an end without an end mark.
        Refused: see `Budget`.
    """

    class Header(_Header):
        pass

    file.seek(0)
    raw = Unpacked(file, compression, budget)
    stream = buffered(raw)
    try:
        with tarfile.open(fileobj=stream, mode="r|", tarinfo=Header, errors="surrogateescape") as archive:
            for member in archive:
                budget.take_member(member.offset)
                vars(archive)["members"] = []  # it would keep all of them
                plain = member.isreg() and member.sparse is None
                opened = archive.extractfile(member) if plain else None
                yield member, None if opened is None else Unpacked(opened, "", None)
    except tarfile.TarError as error:
        raise Damaged(f"the archive is damaged or cut short ({error})", raw.offset) from error
    while stream.read(_PIECE_BYTES):  # what is wrong with the rest shows when it is unpacked
        pass
    if not Header.has_ended:
        raise Damaged("the archive has no end mark: it is cut short or damaged", raw.offset)


def _tar(blob: Blob, file: IO[bytes], compression: str, budget: Budget) -> Iterator[Found]:
    licences = _tar_licences(blob, file, compression, budget)
    for member, stream in _tar_members(file, compression, budget):
        path = _member(blob, member.name.encode(errors="surrogateescape").decode(errors="backslashreplace"))
        at = member.offset
        if _leads_out(member.name):
            yield blob.quarantined("its path leads out of the archive", at, member.size, path)
        elif member.issym() or member.islnk():
            yield _link(blob, path, member, at)
        elif member.isdir() or _is_hidden(member.name):
            continue
        elif stream is None:
            yield blob.quarantined("not a plain file: sparse, a device or a pipe", at, member.size, path)
        else:
            found = replace(
                blob,
                path=path,
                name=PurePosixPath(path).name,
                stream=buffered(stream, member.size),
                time=_utc(member.mtime),
                licences=licences,
                depth=blob.depth + 1,
            )
            yield from unpack(found, budget)


def _link(blob: Blob, path: str, member: tarfile.TarInfo, at: int) -> Quarantined | Skipped:
    target = member.linkname
    if member.issym():
        depth = 0  # how far below the archive's root one stands
        for part in [*PurePosixPath(member.name).parent.parts, *target.split("/")]:
            depth += {"..": -1, "": 0, ".": 0}.get(part, 1)
            if depth < 0 or target.startswith("/"):
                return blob.quarantined("a link out of the archive", at, path=path)
    elif _leads_out(target):
        return blob.quarantined("a link out of the archive", at, path=path)
    return Skipped(path, "a link in an archive, which is not followed", blob.source)


def _tar_licences(blob: Blob, file: IO[bytes], compression: str, budget: Budget) -> LicenceFiles:
    """The licence files of a tar archive, up to where it breaks; counted against a budget of its own."""
    found: dict[str, Evidence] = {}
    try:
        for member, stream in _tar_members(file, compression, Budget(budget.limits, budget.packed_bytes)):
            if stream is not None and is_licence_file(member.name):
                path = _member(blob, member.name)
                found[path] = evidence.of_file(path, buffered(stream, member.size).read(_LICENCE_BYTES))
    except Stopped:
        pass  # said when the members themselves are read
    return blob.licences.joined(found)


def _utc(seconds: float) -> datetime | None:
    """The time of a member; None where its number is none."""
    try:
        return datetime.fromtimestamp(seconds, UTC)
    except (ValueError, OverflowError, OSError):
        return None


# --- zip ---


def _zip(blob: Blob, file: IO[bytes], budget: Budget) -> Iterator[Found]:
    if _directory_bytes(file) > _DIRECTORY_BYTES:
        raise Refused(f"a zip directory of more than {_DIRECTORY_BYTES:,} bytes")
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        raise Damaged(f"the archive is damaged or cut short ({error})") from error
    with archive:
        members = [member for member in archive.infolist() if not member.is_dir()]
        licences = _zip_licences(blob, archive, members)
        for member in members:
            budget.take_member(member.header_offset)
            yield from _zip_member(blob, archive, member, licences, budget)


def _zip_licences(blob: Blob, archive: zipfile.ZipFile, members: list[zipfile.ZipInfo]) -> LicenceFiles:
    found: dict[str, Evidence] = {}
    for member in members:
        if is_licence_file(member.filename):
            path = _member(blob, member.filename)
            with suppress(*_ZIP_DAMAGE), archive.open(member) as stream:  # said when it is read itself
                found[path] = evidence.of_file(path, stream.read(_LICENCE_BYTES))
    return blob.licences.joined(found)


_ZIP_DAMAGE = (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, zlib.error)
"""What opening and reading a member raise; RuntimeError, where it is encrypted."""


def _zip_member(
    blob: Blob,
    archive: zipfile.ZipFile,
    member: zipfile.ZipInfo,
    licences: LicenceFiles,
    budget: Budget,
) -> Iterator[Found]:
    path, at, size = _member(blob, member.filename), member.header_offset, member.file_size
    ratio = budget.limits.ratio
    if _leads_out(member.orig_filename):
        yield blob.quarantined("its path leads out of the archive", at, size, path)
    elif stat.S_ISLNK(member.external_attr >> 16):
        yield Skipped(path, "a link in an archive, which is not followed", blob.source)
    elif _is_hidden(member.filename):
        return
    elif member.flag_bits & 1:
        yield blob.quarantined("encrypted", at, size, path)
    elif size > max(budget.limits.free_bytes, ratio * member.compress_size):
        reason = f"it unpacks to {size:,} bytes, more than {ratio:g} times its size, as bombs do"
        yield blob.quarantined(reason, at, size, path)
    else:
        try:
            stream = archive.open(member)
        except _ZIP_DAMAGE as error:
            yield blob.quarantined(f"the archive is damaged here ({error})", at, size, path)
            return
        with stream:
            inner = replace(
                blob,
                path=path,
                name=PurePosixPath(path).name,
                stream=buffered(Unpacked(stream, "", budget), size),
                time=_zip_time(member),
                licences=licences,
                depth=blob.depth + 1,
            )
            yield from unpack(inner, budget)


def _zip_time(member: zipfile.ZipInfo) -> datetime | None:
    """Its time as if it were UTC: zip archives do not say which zone they mean."""
    try:
        return datetime(*member.date_time, tzinfo=UTC)
    except ValueError:
        return None


def _directory_bytes(file: IO[bytes]) -> int:
    """The size of a zip archive's directory as its end says it; 0 where there is no such end."""
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - 2**16 - 22))
    end = file.read()
    file.seek(0)
    at = end.rfind(b"PK\5\6")
    if at < 0 or len(end) < at + 16:
        return 0
    claimed = int.from_bytes(end[at + 12 : at + 16], "little")
    # A zip64 archive says it elsewhere; its directory is no larger than the file.
    return size if claimed == 2**32 - 1 else claimed
