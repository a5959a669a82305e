"""Opt-out lists: whoever asked not to be learned from, by path, domain, author or content.

    # comment
    path: private/**            a pattern over a document's path (`source/path` too)
    domain: example.org         of an address in the path or the source, subdomains included
    author: Anna B.             a holder of copyright or an author that the text names; also an e-mail address
    sha256: 6f2c...             the content hash of a document

One entry a line. A line that says something else is an error: a wish that is misread is not kept.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
from pydantic import field_validator

from gyrocompass.core.errors import BadInput, did_you_mean
from gyrocompass.data.curate.licence_evidence import copyrights
from gyrocompass.data.curate.step import RecordStep, register

KINDS = ("path", "domain", "author", "sha256")

_AUTHOR = re.compile(r"(?mi)(?:^|[\s#*/@_\"'])authors?(?:__)?[\"']?\s*[:=]\s*(.{2,120})$")
_DOMAIN = re.compile(r"(?i)(?:^|//|@|\s)((?:[\w-]+\.)+[a-z]{2,24})(?=[:/\s]|$)")


@register
class OptOut(RecordStep):
    """Marks documents that somebody asked not to be used.

    Args:
        entries: as a list file has them, `KIND: VALUE` each.
    """

    name: ClassVar[str] = "opt_out"

    entries: tuple[str, ...]

    @field_validator("entries")
    @classmethod
    def _are_entries(cls, entries: tuple[str, ...]) -> tuple[str, ...]:
        for entry in entries:
            _split(entry)
        return entries

    def annotate(self, documents: pa.RecordBatch) -> pa.RecordBatch:
        """`listed`, and the first `entry` that lists it (null: none)."""
        entries = [_split(entry) for entry in self.entries]
        wanted = {kind: {v.casefold(): e for k, v, e in entries if k == kind} for kind in KINDS}
        columns = ("text", "path", "source", "content_hash")
        rows = zip(*(documents.column(name).to_pylist() for name in columns), strict=True)
        found = [_listed(wanted, *row) for row in rows]
        return pa.RecordBatch.from_pydict(
            {
                "id": documents.column("id"),
                "listed": pa.array([entry is not None for entry in found], pa.bool_()),
                "entry": pa.array(found, pa.string()),
            }
        )


def _listed(
    wanted: Mapping[str, Mapping[str, str]], text: str, path: str, source: str, content_hash: str
) -> str | None:
    places = (path.casefold(), f"{source}/{path}".casefold())
    for pattern, entry in wanted["path"].items():
        if any(fnmatch.fnmatchcase(place, pattern) for place in places):
            return entry
    if content_hash in wanted["sha256"]:
        return wanted["sha256"][content_hash]
    if wanted["domain"]:
        for match in _DOMAIN.finditer(f"{source} {path}"):
            labels = match[1].casefold().split(".")
            for first in range(len(labels) - 1):
                if ".".join(labels[first:]) in wanted["domain"]:
                    return wanted["domain"][".".join(labels[first:])]
    if wanted["author"]:
        named = "\n".join([*copyrights(text), *_AUTHOR.findall(text)]).casefold()
        for author, entry in wanted["author"].items():
            if re.search(rf"(?<!\w){re.escape(author)}(?!\w)", named):
                return entry
    return None


def _split(entry: str) -> tuple[str, str, str]:
    """Kind, value, and the entry itself.

    Raises:
        ValueError: it is no entry.
    """
    kind, colon, value = entry.partition(":")
    kind, value = kind.strip(), value.strip()
    if not colon or kind not in KINDS:
        raise ValueError(f"an entry begins with a kind, not with {kind!r}{did_you_mean(kind, KINDS)}")
    if not value:
        raise ValueError(f"an entry names a {kind}: {entry!r}")
    if kind == "sha256" and not re.fullmatch(r"[0-9a-f]{64}", value):
        raise ValueError(f"a sha256 has 64 hexadecimal digits in small letters: {value!r}")
    return kind, value, entry


def read_opt_out(paths: Iterable[Path]) -> OptOut:
    """The entries of list files.

    Raises:
        BadInput: a file cannot be read, or a line is no entry.
    """
    entries: list[str] = []
    for path in paths:
        for number, line in enumerate(_lines(path), 1):
            entry = line.partition("#")[0].strip()
            if entry:
                try:
                    _split(entry)
                except ValueError as error:
                    raise BadInput(str(error), where=f"{path}:{number}") from None
                entries.append(entry)
    return OptOut(entries=tuple(entries))


def _lines(path: Path) -> list[Any]:
    try:
        return path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"the opt-out list cannot be read: {error}", where=path) from None
