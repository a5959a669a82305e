"""Opt-out lists: what must not be read again.

    # one entry a line; a # at the beginning, or after a space, begins a remark
    1a2b3c4d5e6f7a8b                                    a document, by its id
    9f86d081...                                         a content, wherever it stands, by its sha256 (64)
    path:archive/2021/*                                 documents by path, with * and ?
    source:forum                                        all of a source

An entry says what to leave out without saying what it was: hashes, no text. `gyro forget` adds to the store's
own list; a build names more with `opt_out`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from gyrocompass.core.config import config_hash
from gyrocompass.core.errors import BadInput
from gyrocompass.core.folder import write_whole
from gyrocompass.data.document import Document, Record, Skipped

STORE_LIST = "opt-out.txt"
"""The store's own list, in its folder."""

OPTED_OUT = "opted out"


@dataclass(frozen=True)
class OptOut:
    """What is left out.

    >>> lists = OptOut.of(["path:drafts/*"])
    >>> lists.covers(Document(kind="text", text="x", path="drafts/a.md", source="s", slice="text"))
    True
    """

    hashes: frozenset[str] = frozenset()
    """Document ids and content hashes."""
    paths: tuple[str, ...] = ()
    sources: frozenset[str] = frozenset()

    @classmethod
    def of(cls, entries: Iterable[str]) -> OptOut:
        """Of checked entries."""
        known = set(entries)
        paths = sorted(entry.removeprefix("path:") for entry in known if entry.startswith("path:"))
        sources = {entry.removeprefix("source:") for entry in known if entry.startswith("source:")}
        return cls(frozenset(entry for entry in known if ":" not in entry), tuple(paths), frozenset(sources))

    def covers(self, document: Document) -> bool:
        """Whether a document is to be left out: itself, or what it was derived from."""
        return (
            document.id in self.hashes
            or document.content_hash in self.hashes
            or document.source in self.sources
            or not self.hashes.isdisjoint(document.origin_ids)
            or any(fnmatchcase(document.path, pattern) for pattern in self.paths)
        )

    @property
    def digest(self) -> str:
        """A hash of what it says: equal for lists that leave out the same."""
        return config_hash([self.hashes, self.paths, self.sources])


def read_opt_out(paths: Iterable[Path]) -> OptOut:
    """Lists together; the store's own need not exist.

    Raises:
        BadInput: a list is missing, or a line of it is no entry.
    """
    return OptOut.of(entry for path in paths for entry in _entries(path))


def without(records: Iterable[Record], opt_out: OptOut) -> Iterator[Record]:
    """Records, documents that are opted out skipped."""
    for record in records:
        if isinstance(record, Document) and opt_out.covers(record):
            yield Skipped(record.path, OPTED_OUT, record.source)
        else:
            yield record


def add_to_list(path: Path, entries: Iterable[str], remark: str) -> None:
    """Add entries to a list, each with a remark, once."""
    before = path.read_text("utf-8") if path.is_file() else ""
    known = set(_entries(path)) if before else set()
    added = "".join(f"{entry}  # {remark}\n" for entry in entries if entry not in known)
    if added:
        write_whole(path, before + ("" if not before or before.endswith("\n") else "\n") + added)


def _entries(path: Path) -> list[str]:
    if path.name == STORE_LIST and not path.exists():
        return []
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"the opt-out list cannot be read: {error}", where=path) from error
    entries = []
    for number, line in enumerate(lines, 1):
        entry = re.sub(r"(^|\s)#.*", "", line).strip()
        if not entry:
            continue
        if not re.fullmatch(r"[0-9a-f]{16}|[0-9a-f]{64}|path:.+|source:.+", entry):
            raise BadInput(
                f"not an entry of an opt-out list: {entry!r}",
                where=f"{path}:{number}",
                fix="write a document's id (16 digits), a content's sha256 (64), path:PATTERN or source:NAME",
            )
        entries.append(entry)
    return entries
