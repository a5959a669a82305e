"""A source of raw files, read: each file by its suffix, each document with where it came from.

    path --unpack--> Blob --read_blob--> Document | Quarantined | Skipped

    .jsonl .ndjson .json .parquet       records, also in the shapes of OpenAI's and ShareGPT's chats
    .warc .wet                          web pages as they were fetched
    .html .htm .xhtml                   pages
    .log .irc .chat                     conversations, and logs of people
    code, prose, licence files          whole files, one document each

Every suffix may be followed by one of how it is compressed, and every file may lie in an archive.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from gyrocompass.core.errors import BadInput
from gyrocompass.data.document import (
    Document,
    Evidence,
    Provenance,
    Quarantined,
    Record,
    Skipped,
)
from gyrocompass.data.filetypes import CODE_LANGUAGES, CODE_NAMES, INTERPRETERS, TEXT_SUFFIXES
from gyrocompass.data.ingest import chatlogs, evidence
from gyrocompass.data.ingest.archives import Blob, seekable, unpack
from gyrocompass.data.ingest.config import IngestSource
from gyrocompass.data.ingest.evidence import LicenceFiles, is_licence_file
from gyrocompass.data.ingest.pages import NoText, PageReader, declared_charset, declared_language
from gyrocompass.data.ingest.streams import Budget, Refused, Stopped, whole
from gyrocompass.data.ingest.texts import Text, Undecodable, decode
from gyrocompass.data.ingest.warc import WARC_SUFFIXES, Capture, captures
from gyrocompass.data.lines import bounded_lines
from gyrocompass.data.paths import is_unnamed, matched, unnamed
from gyrocompass.data.records import Malformed, Place, RecordOptions, read_record
from gyrocompass.data.tables import jsonl_record, read_parquet

HTML_SUFFIXES = (".html", ".htm", ".xhtml")
PAGE_TYPES = ("text/html", "application/xhtml+xml")
WEB = "web"

_LINE_SUFFIXES = (".jsonl", ".ndjson")
_CODING = re.compile(rb"^[ \t\f]*#.*?coding[:=][ \t]*([-\w.]+)")
_SHEBANG = re.compile(r"#!\s*\S*?(?:/env\s+)?([a-z]+)[\d.]*(?:\s|$)")


def read_ingest(config: IngestSource) -> Iterator[Record]:
    """Read raw files.

    Raises:
        BadInput: there are none; or one is damaged, hostile or too large and `on_damage` is `refuse`.
        MissingDependency: what a kind of file needs is not installed.
        GyroError: an archive in an archive cannot be copied, as the disk is full.
    """
    source = config.name or config.path
    paths = matched(config.path, config.include)
    licences = LicenceFiles(
        {
            path.as_posix(): evidence.of_file(path.as_posix(), path.read_bytes()[:4096])
            for path in paths
            if is_licence_file(path.name) and not is_unnamed(path)
        }
    )
    with PageReader(
        "resiliparse" if config.html == "resiliparse" else "trafilatura", config.limits.html_seconds
    ) as pages:
        reader = Reader(config, pages)
        for path in paths:
            for record in (
                [unnamed(path, source)] if is_unnamed(path) else reader.file(path, source, licences)
            ):
                if isinstance(record, Quarantined) and config.on_damage == "refuse":
                    raise _refusal(record)
                yield record


def _refusal(record: Quarantined) -> BadInput:
    place = record.path if record.line is None else f"{record.path}:{record.line}"
    return BadInput(
        record.reason,
        where=place if record.offset is None else f"{place}, byte {record.offset:,}",
        fix="mend or leave out the file, or set on_damage: quarantine to go on without it",
    )


class Reader(NamedTuple):
    """Reads single files as a source says."""

    config: IngestSource
    pages: PageReader

    def file(self, path: Path, source: str, licences: LicenceFiles) -> Iterator[Record]:
        """A file on the disk."""
        name = path.as_posix()
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            budget = Budget(self.config.limits, file.tell())
            file.seek(0)
            blob = Blob(name, path.name, file, source, digest, licences=licences)
            try:
                for found in unpack(blob, budget):
                    if isinstance(found, Blob):
                        yield from self.blob(found)
                    else:
                        yield found
            except Refused as error:
                yield blob.quarantined(error.reason, error.offset)

    def blob(self, blob: Blob) -> Iterator[Record]:
        """A file that is no archive; what is wrong with its bytes becomes a quarantined record."""
        try:
            yield from self._by_suffix(blob)
        except Stopped as error:
            yield blob.quarantined(error.reason, error.offset)
        except Undecodable as error:
            yield blob.quarantined(str(error), error.offset)

    def _by_suffix(self, blob: Blob) -> Iterator[Record]:
        name = blob.name.lower()
        if name.endswith(_LINE_SUFFIXES):
            return self._lines(blob)
        if name.endswith(".json"):
            return self._array(blob)
        if name.endswith(".parquet"):
            return self._parquet(blob)
        if name.endswith(WARC_SUFFIXES):
            return self._warc(blob)
        return iter([self._whole(blob)])

    # --- records ---

    def _lines(self, blob: Blob) -> Iterator[Record]:
        for line in bounded_lines(blob.stream, self.config.limits.line_bytes):
            record = jsonl_record(line, self._options, blob.path, blob.source, chatlogs.as_messages)
            if isinstance(record, Document):
                record = self._found(record, line.data.rstrip(b"\r\n"), blob)
            yield record

    def _array(self, blob: Blob) -> Iterator[Record]:
        for number, raw in chatlogs.array_items(blob.stream, self.config.limits.line_bytes):
            place = Place(blob.path, number, blob.source)
            try:
                record: Record = read_record(chatlogs.as_messages(raw), self._options, place)
            except Malformed as reason:
                record = place.quarantined(str(reason), raw)
            if isinstance(record, Document):
                record = self._found(record, "".join(record.texts).encode(), blob)
            yield record

    def _parquet(self, blob: Blob) -> Iterator[Record]:
        with seekable(blob) as file:
            try:
                for record in read_parquet(Path(blob.path), self._options, blob.source, file):
                    if isinstance(record, Document):
                        record = self._found(record, "".join(record.texts).encode(), blob)
                    yield record
            except BadInput as error:
                yield blob.quarantined(error.what)

    @property
    def _options(self) -> RecordOptions:
        return RecordOptions(**self.config.model_dump(include=set(RecordOptions.model_fields)))

    # --- pages ---

    def _warc(self, blob: Blob) -> Iterator[Record]:
        for capture in captures(blob.stream, self.config.limits.html_bytes):
            yield self._captured(capture, blob)

    def _captured(self, capture: Capture, blob: Blob) -> Record:
        path = f"{blob.path}#{capture.url}"
        page = replace(blob, path=path, time=capture.time)
        if capture.left_out:
            return Skipped(path, capture.left_out, blob.source)
        if not capture.body.strip():
            return Skipped(path, "an empty body", blob.source)
        if len(capture.body) > self.config.limits.html_bytes:
            reason = f"a page of more than {self.config.limits.html_bytes:,} bytes"
            return page.quarantined(reason, capture.offset)
        try:
            if capture.media_type in PAGE_TYPES:
                return self._page(capture.body, capture.charset, page)
            if capture.media_type == "text/plain":
                text = decode(capture.body, declared=capture.charset, repair=self.config.repair, prose=True)
                return self._document(text, capture.body, page, WEB)
        except Undecodable as error:
            return page.quarantined(str(error), capture.offset, len(capture.body))
        return Skipped(path, f"no text but {capture.media_type or 'of no known type'}", blob.source)

    def _page(self, data: bytes, charset: str | None, blob: Blob) -> Record:
        if self.config.html == "skip":
            return Skipped(blob.path, "a page, and html is skip", blob.source)
        declared = charset or declared_charset(data)
        html = decode(data, declared=declared, repair=self.config.repair, prose=False)
        try:
            text = self.pages.text(html.text)
        except NoText as reason:
            return blob.quarantined(str(reason), n_bytes=len(data))
        mended = decode(text.encode(), repair=self.config.repair, prose=True)
        # The page's charset is that of all its text, wherever that stood in it.
        repairs = tuple(each._replace(end=len(mended.text)) for each in html.repairs) + mended.repairs
        return self._document(mended._replace(repairs=repairs), data, blob, WEB, html.text)

    # --- whole files ---

    def _whole(self, blob: Blob) -> Record:
        name = blob.name.lower()
        is_page = name.endswith(HTML_SUFFIXES)
        most = self.config.limits.html_bytes if is_page else self.config.limits.document_bytes
        suffix = PurePosixPath(name).suffix
        language = CODE_LANGUAGES.get(suffix) or CODE_NAMES.get(name)
        is_log = name.endswith(chatlogs.LOG_SUFFIXES)
        known = is_page or is_log or language or suffix in TEXT_SUFFIXES or _is_plain_name(name)
        if not (known or self.config.include):
            return Skipped(blob.path, f"not a suffix that is read: {suffix or 'none'}", blob.source)
        data = whole(blob.stream, most)
        if not data.strip():
            return Skipped(blob.path, "empty file", blob.source)
        if is_page:
            return self._page(data, None, blob)
        declared = _declared_coding(data) if language == "python" else None
        text = decode(data, declared=declared, repair=self.config.repair, prose=language is None)
        if language is None and (match := _SHEBANG.match(text.text)):
            language = INTERPRETERS.get(match[1])
        if is_log:
            return self._log(text, data, blob)
        return self._document(text, data, blob, "code" if language else "text", language=language)

    def _log(self, text: Text, data: bytes, blob: Blob) -> Record:
        turns = chatlogs.turns(text.text)
        if turns is None:
            slice_name = chatlogs.LOG_SLICE if chatlogs.is_log(text.text) else "text"
            dated = replace(blob, time=chatlogs.log_time(text.text) or blob.time)
            return self._document(text, data, dated, slice_name)
        found = self._document(text, data, blob, "chat")
        return replace(found, kind="chat", text="", messages=turns)

    # --- what every document gets ---

    def _document(
        self,
        text: Text,
        data: bytes,
        blob: Blob,
        slice_name: str,
        page: str | None = None,
        language: str | None = None,
    ) -> Document:
        """A text as a document. Of a page, language and licence stand in its HTML."""
        declared = None if page is None else declared_language(page)
        document = Document(
            kind="text",
            text=text.text,
            path=blob.path,
            source=blob.source,
            slice=self.config.slice or slice_name,
            licence=self.config.licence,
            language=self.config.language or language or declared,
            weight=self.config.weight,
        )
        said = evidence.in_text(text.text, blob.path) if page is None else evidence.in_page(page, blob.path)
        return self._found(document, data, blob, said, text)

    def _found(
        self,
        document: Document,
        data: bytes,
        blob: Blob,
        said: tuple[Evidence, ...] = (),
        text: Text | None = None,
    ) -> Document:
        """The document with its provenance, and the licence that it states if nobody else says one."""
        if document.licence is not None and document.licence != self.config.licence:
            said = (Evidence("record", document.path, document.licence),)
        provenance = Provenance(
            hashlib.sha256(data).hexdigest(),
            (*said, *blob.licences.above(blob.path)),
            text.repairs if text else (),
        )
        return replace(
            document,
            licence=document.licence or evidence.stated(said),
            time=blob.time,
            file_hash=blob.file_hash,
            provenance=provenance,
        )


def _is_plain_name(name: str) -> bool:
    """Whether a file without a telling suffix is text by custom."""
    stem = name.partition(".")[0]
    return is_licence_file(name) or stem in ("readme", "changelog", "news", "authors", "contributing", "todo")


def _declared_coding(data: bytes) -> str | None:
    """What a Python file's first two lines declare (PEP 263)."""
    for line in data[:1024].split(b"\n")[:2]:
        if match := _CODING.match(line):
            return match[1].decode()
    return None
