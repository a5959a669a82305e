"""What says something about a text's licence: found, quoted and placed, never weighed here.

    SPDX-License-Identifier: in its first lines     header
    LICENSE, COPYING, ... in its folder or above    file; the nearest folder that has any
    rel="license" of a page                         link

Which licence a licence file is, and what to do where two of these disagree, is for the licence step, which
finds the file's text among the documents by its path.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePosixPath

from gyrocompass.data.document import Evidence

_FIRST_LINES = 60
_SAID_CHARACTERS = 160
_LICENCE_FILE = re.compile(r"(licen[cs]e|copying|copyright|unlicense|notice)([-_.].*)?$", re.IGNORECASE)
_NOT_LICENCE = re.compile(r"\.(py|c|h|js|ts|go|rs|java|rb|json|html?|ya?ml)$", re.IGNORECASE)
_SPDX = re.compile(r"SPDX-License-Identifier:[ \t]*([A-Za-z0-9.+()\- ]{2,120})")
_IDENTIFIER = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*\Z")
_REL_LICENCE = re.compile(
    r"<(?:a|link)\b(?=[^>]*\brel\s*=\s*[\"']?[^\"'>]*\blicen[cs]e\b)[^>]*\bhref\s*=\s*[\"']?([^\"'\s>]+)",
    re.IGNORECASE,
)
_CREATIVE_COMMONS = re.compile(
    r"https?://creativecommons\.org/(?:licenses/(by(?:-nc)?(?:-sa|-nd)?)|publicdomain/(zero))/(\d\.\d)"
)


def is_licence_file(path: str) -> bool:
    """Whether a file's name says that it holds a licence.

    >>> [is_licence_file(name) for name in ("a/LICENSE", "COPYING.LESSER", "licence.md", "license.py")]
    [True, True, True, False]
    """
    name = PurePosixPath(path).name
    return bool(_LICENCE_FILE.match(name)) and not _NOT_LICENCE.search(name)


def of_file(path: str, data: bytes) -> Evidence:
    """A licence file as evidence: its first line that says something."""
    lines = (line.strip() for line in data.decode("utf-8", "replace").splitlines())
    return Evidence("file", path, next(filter(None, lines), "")[:_SAID_CHARACTERS])


class LicenceFiles:
    """The licence files of a tree or an archive, by their paths."""

    def __init__(self, by_path: Mapping[str, Evidence] | None = None) -> None:
        self.by_path = dict(by_path or {})
        self._by_folder: dict[str, list[Evidence]] = {}
        for path, evidence in sorted(self.by_path.items()):
            self._by_folder.setdefault(path.rpartition("/")[0], []).append(evidence)

    def joined(self, by_path: Mapping[str, Evidence]) -> LicenceFiles:
        """With more of them, such as those of an archive in this tree."""
        return LicenceFiles({**self.by_path, **by_path})

    def above(self, path: str) -> tuple[Evidence, ...]:
        """Those of the nearest folder, of the file's own and those above it, that has any."""
        folder = path
        while folder:
            folder = folder.rpartition("/")[0]
            if folder in self._by_folder:
                return tuple(self._by_folder[folder])
        return ()


def in_text(text: str, path: str) -> tuple[Evidence, ...]:
    """The SPDX lines at the start of a text.

    >>> in_text("# SPDX-License-Identifier: MIT OR Apache-2.0\\nx = 1", "a.py")[0].says
    'MIT OR Apache-2.0'
    """
    found = []
    for number, line in enumerate(text.split("\n", _FIRST_LINES)[:_FIRST_LINES], 1):
        if match := _SPDX.search(line):
            said = match[1].strip().removesuffix("--").strip()
            found.append(Evidence("header", f"{path}:{number}", said))
    return tuple(found)


def in_page(html: str, path: str) -> tuple[Evidence, ...]:
    """What a page links to as its licence."""
    found = dict.fromkeys(match[1] for match in _REL_LICENCE.finditer(html))
    return tuple(Evidence("link", path, url[:_SAID_CHARACTERS]) for url in found)


def stated(evidence: tuple[Evidence, ...]) -> str | None:
    """The SPDX expression that a document states of itself, if it states one and no other.

    >>> stated((Evidence("link", "p", "https://creativecommons.org/licenses/by-sa/4.0/"),))
    'CC-BY-SA-4.0'
    """
    said = {one for each in evidence if (one := _expression(each))}
    return said.pop() if len(said) == 1 else None


def _expression(evidence: Evidence) -> str | None:
    if evidence.kind == "header":
        words = re.split(r"[()\s]+", evidence.says)
        return evidence.says if all(_IDENTIFIER.match(word) for word in words if word) else None
    if evidence.kind == "link" and (match := _CREATIVE_COMMONS.match(evidence.says)):
        return f"CC0-{match[3]}" if match[2] else f"CC-{match[1].upper()}-{match[3]}"
    return None
