"""Debian's machine-readable copyright files: which licence a packaged file is under, by its path.

    text --parse--> Copyright           or None, where it is not in that format
    Copyright.licence(paths) --> Stanza, the last whose patterns match, as the format says

Patterns are those of the source package; a documentation file is installed elsewhere. So a file is looked up
under the ends of its installed path too (`contrib/x.md`, `Documentation/contrib/x.md`, ...), and where only
the stanza for all files matches, that one holds.

Debian's short names become SPDX expressions; one that has no SPDX name stays as evidence alone.

Source: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

_FORMAT = re.compile(
    r"Format(-Specification)?:\s*\S*(copyright-format|dep5|DEP-?5|Proposals/CopyrightFormat)", re.I
)
_COMMON = re.compile(r"/usr/share/common-licenses/([A-Za-z0-9][A-Za-z0-9.+-]*[A-Za-z0-9+])")

_SPDX = {
    "0bsd": "0BSD",
    "afl-2.1": "AFL-2.1",
    "agpl-3": "AGPL-3.0-only",
    "agpl-3+": "AGPL-3.0-or-later",
    "apache-1.1": "Apache-1.1",
    "apache-2": "Apache-2.0",
    "apache-2.0": "Apache-2.0",
    "artistic": "Artistic-1.0-Perl",
    "artistic-1": "Artistic-1.0-Perl",
    "artistic-2": "Artistic-2.0",
    "artistic-2.0": "Artistic-2.0",
    "boost-1.0": "BSL-1.0",
    "bsd-2-clause": "BSD-2-Clause",
    "bsd-3-clause": "BSD-3-Clause",
    "bsd-4-clause": "BSD-4-Clause",
    "bsl-1.0": "BSL-1.0",
    "cc0": "CC0-1.0",
    "cc0-1.0": "CC0-1.0",
    "curl": "curl",
    "eclipse": "EPL-1.0",
    "epl-1": "EPL-1.0",
    "epl-2": "EPL-2.0",
    "epl-2.0": "EPL-2.0",
    "expat": "MIT",
    "ftl": "FTL",
    "isc": "ISC",
    "lppl-1.3": "LPPL-1.3a",
    "lppl-1.3c": "LPPL-1.3c",
    "mit": "MIT",
    "mit/x11": "MIT",
    "mpl-1.1": "MPL-1.1",
    "mpl-2": "MPL-2.0",
    "mpl-2.0": "MPL-2.0",
    "ofl-1.1": "OFL-1.1",
    "openssl": "OpenSSL",
    "postgresql": "PostgreSQL",
    "psf-2": "PSF-2.0",
    "python": "Python-2.0",
    "python-2.0": "Python-2.0",
    "ruby": "Ruby",
    "unicode": "Unicode-DFS-2016",
    "unlicense": "Unlicense",
    "vim": "Vim",
    "w3c": "W3C",
    "wtfpl": "WTFPL",
    "wtfpl-2": "WTFPL",
    "x11": "X11",
    "zlib": "Zlib",
}
_GNU = re.compile(r"(gpl|lgpl|gfdl)(-niv)?-?v?(\d)(?:\.(\d))?(\+)?\Z", re.I)
_CREATIVE_COMMONS = re.compile(r"cc-(by(?:-nc)?(?:-sa|-nd)?)-(\d\.\d)\Z", re.I)
_EXCEPTIONS = {
    "classpath": "Classpath-exception-2.0",
    "autoconf": "Autoconf-exception-2.0",
    "bison": "Bison-exception-2.2",
    "font": "Font-exception-2.0",
    "gcc": "GCC-exception-3.1",
    "libtool": "Libtool-exception",
    "llvm": "LLVM-exception",
    "openssl": "openvpn-openssl-exception",
}


class Stanza(NamedTuple):
    """What a copyright file says of some files."""

    patterns: tuple[str, ...]
    licence: str
    """Debian's short name, or an expression of them."""
    line: int
    """Where it begins in the copyright file, from 1."""

    @property
    def is_general(self) -> bool:
        """Whether it speaks of all files."""
        return "*" in self.patterns


class Copyright(NamedTuple):
    """A machine-readable copyright file."""

    stanzas: tuple[Stanza, ...]

    def licence(self, paths: Sequence[str]) -> Stanza | None:
        """The stanza of a file.

        Args:
            paths: where it may lie in the source package, the likeliest first.
        """
        for path in paths:
            specific = [s for s in self.stanzas if not s.is_general and _matches(s.patterns, path)]
            if specific:
                return specific[-1]
        general = [stanza for stanza in self.stanzas if stanza.is_general]
        return general[-1] if general else None


def parse(text: str) -> Copyright | None:
    """A copyright file, or None where it is not in the machine-readable format.

    >>> found = parse("Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/\\n\\n"
    ...               "Files: *\\nCopyright: A\\nLicense: GPL-2+\\n\\n"
    ...               "Files: doc/*\\nCopyright: B\\nLicense: GFDL-1.3+\\n")
    >>> found.licence(["doc/manual.txt"]).licence
    'GFDL-1.3+'
    """
    if not _FORMAT.search(text[:1000]):
        return None
    stanzas = []
    for line, fields in _paragraphs(text):
        if "files" in fields and fields.get("license", "").strip():
            licence = fields["license"].strip().split("\n")[0].strip()
            stanzas.append(Stanza(tuple(fields["files"].replace(",", " ").split()), licence, line))
    if not stanzas:
        return None
    return Copyright(tuple(stanzas))


def common_licences(text: str) -> tuple[str, ...]:
    """The files of /usr/share/common-licenses that a copyright file in free words refers to."""
    return tuple(dict.fromkeys(match[1] for match in _COMMON.finditer(text)))


def spdx(licence: str) -> str | None:
    """An SPDX expression for Debian's short names, or None where one of them has none.

    >>> spdx("GPL-2+ or Artistic"), spdx("GFDL-NIV-1.3+"), spdx("public-domain")
    ('GPL-2.0-or-later OR Artistic-1.0-Perl', 'GFDL-1.3-no-invariants-or-later', None)
    """
    # A comma binds less than a word: "A or B, and C" is "(A OR B) AND C".
    outer = re.split(r"\s*,\s*(and|or)\s+", licence, flags=re.I)
    parts = []
    for index, part in enumerate(outer):
        if index % 2:
            parts.append(part.upper())
            continue
        inner = re.split(r"\s+(and|or|and/or)\s+", part, flags=re.I)
        names = [_name(one) for one in inner[::2]]
        if any(name is None for name in names):
            return None
        joined = " ".join(
            (names[k // 2] or "") if k % 2 == 0 else ("AND" if inner[k].lower() == "and" else "OR")
            for k in range(len(inner))
        )
        parts.append(f"({joined})" if len(outer) > 1 and len(inner) > 1 else joined)
    return " ".join(parts)


def _name(short: str) -> str | None:
    name, _, exception = short.strip().partition(" with ")
    known = _licence(name.strip())
    if known is None or not exception:
        return known
    word = exception.lower().removesuffix(" exception").removesuffix("-exception").strip()
    return f"{known} WITH {_EXCEPTIONS[word]}" if word in _EXCEPTIONS else None


def _licence(name: str) -> str | None:
    if match := _GNU.match(name):
        family, invariants, major, minor, plus = match.groups()
        later = "or-later" if plus else "only"
        without = "no-invariants-" if invariants else ""
        return f"{family.upper()}-{major}.{minor or 0}-{without}{later}"
    if match := _CREATIVE_COMMONS.match(name):
        return f"CC-{match[1].upper()}-{match[2]}"
    return _SPDX.get(name.lower())


def _paragraphs(text: str) -> Iterator[tuple[int, dict[str, str]]]:
    """The paragraphs of a control file, each with its first line's number and its fields."""
    fields: dict[str, str] = {}
    start, last = 1, ""
    for number, line in enumerate([*text.split("\n"), ""], 1):
        if not line.strip():
            if fields:
                yield start, fields
            fields, last = {}, ""
        elif line[0] in " \t":
            if last:
                fields[last] += f"\n{line.strip()}"
        elif ":" in line and not line.startswith("#"):
            start = start if fields else number
            name, _, value = line.partition(":")
            last = name.strip().lower()
            fields[last] = value.strip()


def _matches(patterns: tuple[str, ...], path: str) -> bool:
    return _pattern(patterns).fullmatch(path) is not None


@lru_cache(maxsize=4096)
def _pattern(patterns: tuple[str, ...]) -> re.Pattern[str]:
    """Patterns of the format, in which * and ? match slashes too, as one."""
    escaped = (re.escape(pattern.removeprefix("./")) for pattern in patterns)
    return re.compile("|".join(each.replace(r"\*", ".*").replace(r"\?", ".") for each in escaped), re.DOTALL)
