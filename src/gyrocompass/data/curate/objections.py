"""Objections: whoever asked not to be learned from, by the domain they publish at or by their name.

    # a remark
    domain: example.org         of an address in the path or the source, subdomains included
    author: Anna B.             a holder of copyright or an author that the text names; also an e-mail address

One entry a line. A line that says something else is an error: a wish that is misread is not kept. Documents,
paths, sources and contents are left out before they are read (`optout`); this is what takes a look at the
text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
from pydantic import field_validator

from gyrocompass.core.errors import BadInput, did_you_mean
from gyrocompass.data.curate.licence_evidence import copyrights
from gyrocompass.data.curate.step import RecordStep, register

KINDS = ("domain", "author")

_AUTHOR = re.compile(r"(?mi)(?:^|[\s#*/@_\"'])authors?(?:__)?[\"']?\s*[:=]\s*(.{2,120})$")
_DOMAIN = re.compile(r"(?i)(?:^|//|@|\s)((?:[\w-]+\.)+[a-z]{2,24})(?=[:/\s]|$)")


@register
class Objections(RecordStep):
    """Marks documents that somebody asked not to be used.

    Args:
        entries: as a list file has them, `KIND: VALUE` each.
    """

    name: ClassVar[str] = "objections"

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
        columns = ("text", "path", "source")
        rows = zip(*(documents.column(name).to_pylist() for name in columns), strict=True)
        found = [_listed(wanted, *row) for row in rows]
        return pa.RecordBatch.from_pydict(
            {
                "id": documents.column("id"),
                "listed": pa.array([entry is not None for entry in found], pa.bool_()),
                "entry": pa.array(found, pa.string()),
            }
        )


def _listed(wanted: Mapping[str, Mapping[str, str]], text: str, path: str, source: str) -> str | None:
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
        raise ValueError(f"an entry says which {kind}: {entry!r}")
    return kind, value, entry


def read_objections(paths: Iterable[Path]) -> Objections:
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
    return Objections(entries=tuple(entries))


def _lines(path: Path) -> list[Any]:
    try:
        return path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"the list of objections cannot be read: {error}", where=path) from None
