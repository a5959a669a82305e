"""Debian packages as they lie on a disk: which one a file belongs to, and which licence it states for it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from gyrocompass.data import dep5
from gyrocompass.data.document import Evidence

DOC = "usr/share/doc"
_LISTS = "var/lib/dpkg/info"


class Packages:
    """Which package a file belongs to, and what its copyright file says.

    Args:
        root: the folder that holds `usr/share`.
        folders: below it, those whose files are asked for.
    """

    def __init__(self, root: Path, folders: Iterable[str]) -> None:
        self._root = root
        self._owners = _owners(root, tuple(f"/{folder}/" for folder in folders))
        copyrights = sorted((root / DOC).glob("*/copyright"))
        self.only = copyrights[0].parent.name if len(copyrights) == 1 else None
        """The package, where only one is here."""
        self._read: dict[str, Copyright | None] = {}

    def owner(self, path: Path) -> str | None:
        """What dpkg says."""
        return self._owners.get("/" + path.relative_to(self._root).as_posix())

    def copyright_file(self, package: str | None) -> Path | None:
        """A package's copyright file, which may be another one's of the same source."""
        path = self._root / DOC / (package or "") / "copyright"
        return path if package and path.is_file() else None

    def copyright(self, package: str | None) -> Copyright | None:
        """What it says."""
        path = self.copyright_file(package)
        if path is None or package is None:
            return None
        if package not in self._read:
            text = path.read_bytes().decode("utf-8", "replace")
            self._read[package] = Copyright(path.as_posix(), dep5.parse(text), dep5.common_licences(text))
        return self._read[package]


class Copyright(NamedTuple):
    """A copyright file that was read."""

    path: str
    parsed: dep5.Copyright | None
    common: tuple[str, ...]
    """The files of /usr/share/common-licenses that it refers to."""

    def of(self, relative: str) -> tuple[str | None, tuple[Evidence, ...]]:
        """A file's licence as SPDX, and what says so.

        Args:
            relative: the file's path below its package's folder of documentation.
        """
        if self.parsed is None:
            return None, tuple(
                Evidence("copyright", self.path, f"refers to common-licenses/{name}") for name in self.common
            )
        bare = relative.removesuffix(".gz")
        name = PurePosixPath(bare).name
        paths = [bare, *(f"{folder}/{bare}" for folder in ("doc", "docs", "Documentation", "man")), name]
        stanza = self.parsed.licence(paths)
        if stanza is None:
            return None, ()
        said = Evidence("copyright", f"{self.path}:{stanza.line}", stanza.licence)
        return dep5.spdx(stanza.licence), (said,)


def _owners(root: Path, folders: tuple[str, ...]) -> dict[str, str]:
    """dpkg's lists: the package of each file in the folders."""
    owners = {}
    for listing in sorted((root / _LISTS).glob("*.list")):
        package = listing.name.removesuffix(".list").partition(":")[0]
        for line in listing.read_text("utf-8", "surrogateescape").split("\n"):
            if line.startswith(folders):
                owners[line] = package
    return owners
