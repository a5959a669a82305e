"""SPDX licence expressions, and how much each asks of who uses the text.

    "MIT OR (Apache-2.0 AND GPL-2.0+)" --parse--> Expression --strictness--> Strictness

The order of strictness is what a builder of models needs to know of a licence: what it asks before a text may
be used and passed on. A choice (OR) asks as little as its mildest part, a conjunction (AND) as much as its
strictest; an exception (WITH) never asks for more, and its licence's own place is kept. `join` is the least
upper bound: what is asked of who has one text under several licences.

Left out: compatibility of licences with each other, and law. A licence that is not in the table is `UNKNOWN`,
which is the strictest of all.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache


class Strictness(enum.IntEnum):
    """What a licence asks, from nothing to everything."""

    PUBLIC_DOMAIN = 0
    """Nothing."""
    PERMISSIVE = 1
    """That its notice be kept."""
    ATTRIBUTION = 2
    """That authors be named, for content."""
    WEAK_COPYLEFT = 3
    """That changes to the text itself stay free."""
    STRONG_COPYLEFT = 4
    """That works made from it stay free, or be shared alike."""
    NETWORK_COPYLEFT = 5
    """The same for services."""
    NON_COMMERCIAL = 6
    """That nobody earns by it."""
    NO_DERIVATIVES = 7
    """That nothing be made from it."""
    PROPRIETARY = 8
    """A contract."""
    UNKNOWN = 9
    """Not known."""


_TABLE = {
    Strictness.PUBLIC_DOMAIN: "CC0-1.0 Unlicense 0BSD WTFPL PDDL-1.0 MIT-0 CC-PDDC blessing "
    "LicenseRef-public-domain",
    Strictness.PERMISSIVE: "MIT Apache-2.0 Apache-1.1 Apache-1.0 BSD-1-Clause BSD-2-Clause BSD-3-Clause "
    "BSD-4-Clause"
    " BSD-2-Clause-Patent BSD-3-Clause-Clear BSD-Source-Code ISC Zlib zlib-acknowledgement BSL-1.0 "
    "PSF-2.0 Python-2.0"
    " Python-2.0.1 CNRI-Python X11 MIT-CMU HPND HPND-sell-variant NTP NCSA PostgreSQL OpenSSL curl "
    "libpng Libpng-2.0"
    " TCL Ruby Vim IJG FTL AFL-2.1 AFL-3.0 ECL-2.0 Artistic-2.0 PHP-3.0 PHP-3.01 ZPL-2.1 W3C "
    "Unicode-3.0 Unicode-DFS-2016"
    " Unicode-TOU UPL-1.0 MulanPSL-2.0 BlueOak-1.0.0 bzip2-1.0.6 ICU Intel MS-PL OLDAP-2.8 Xnet "
    "Spencer-94 SMLNJ"
    " TU-Berlin-2.0 Beerware JSON FSFAP FSFUL FSFULLR Linux-man-pages-copyleft",
    Strictness.ATTRIBUTION: "CC-BY-1.0 CC-BY-2.0 CC-BY-2.5 CC-BY-3.0 CC-BY-4.0 ODC-By-1.0 OGL-UK-3.0 "
    "etalab-2.0"
    " DL-DE-BY-2.0 CDLA-Permissive-1.0 CDLA-Permissive-2.0 NLOD-2.0",
    Strictness.WEAK_COPYLEFT: "LGPL-2.0-only LGPL-2.0-or-later LGPL-2.1-only LGPL-2.1-or-later LGPL-3.0-only"
    " LGPL-3.0-or-later MPL-1.0 MPL-1.1 MPL-2.0 MPL-2.0-no-copyleft-exception EPL-1.0 EPL-2.0 "
    "CDDL-1.0 CDDL-1.1 CPL-1.0"
    " IPL-1.0 Artistic-1.0 Artistic-1.0-Perl Artistic-1.0-cl8 MS-RL OFL-1.0 OFL-1.1 APSL-2.0 SPL-1.0 "
    "CDLA-Sharing-1.0"
    " LPPL-1.3c LPPL-1.2 QPL-1.0",
    Strictness.STRONG_COPYLEFT: "GPL-1.0-only GPL-1.0-or-later GPL-2.0-only GPL-2.0-or-later GPL-3.0-only"
    " GPL-3.0-or-later GFDL-1.1-only GFDL-1.1-or-later GFDL-1.2-only GFDL-1.2-or-later GFDL-1.3-only "
    "GFDL-1.3-or-later"
    " GFDL-1.2-no-invariants-or-later GFDL-1.3-no-invariants-or-later EUPL-1.1 EUPL-1.2 CECILL-2.0 "
    "CECILL-2.1 OSL-3.0"
    " CC-BY-SA-1.0 CC-BY-SA-2.0 CC-BY-SA-2.5 CC-BY-SA-3.0 CC-BY-SA-4.0 ODbL-1.0 Sleepycat",
    Strictness.NETWORK_COPYLEFT: "AGPL-1.0-only AGPL-1.0-or-later AGPL-3.0-only AGPL-3.0-or-later SSPL-1.0 "
    "RPL-1.5",
    Strictness.NON_COMMERCIAL: "CC-BY-NC-1.0 CC-BY-NC-2.0 CC-BY-NC-2.5 CC-BY-NC-3.0 CC-BY-NC-4.0 "
    "CC-BY-NC-SA-1.0"
    " CC-BY-NC-SA-2.0 CC-BY-NC-SA-2.5 CC-BY-NC-SA-3.0 CC-BY-NC-SA-4.0 BUSL-1.1 Elastic-2.0 "
    "PolyForm-Noncommercial-1.0.0",
    Strictness.NO_DERIVATIVES: "CC-BY-ND-1.0 CC-BY-ND-2.0 CC-BY-ND-2.5 CC-BY-ND-3.0 CC-BY-ND-4.0 "
    "CC-BY-NC-ND-1.0"
    " CC-BY-NC-ND-2.0 CC-BY-NC-ND-2.5 CC-BY-NC-ND-3.0 CC-BY-NC-ND-4.0",
    Strictness.PROPRIETARY: "LicenseRef-proprietary",
}
STRICTNESS = {name: level for level, names in _TABLE.items() for name in names.split()}
"""Where each licence stands."""

_BY_FOLD = {name.casefold(): name for name in STRICTNESS}
_DEPRECATED = re.compile(r"((?:AGPL|LGPL|GPL|GFDL)-\d\.\d)(\+)?\Z", re.IGNORECASE)
_TOKEN = re.compile(r"\s*(?:([()])|([A-Za-z0-9.:+-]+))")
_DEEPEST = 64


class NotAnExpression(ValueError):  # noqa: N818
    """A text is no SPDX expression."""


@dataclass(frozen=True)
class Expression:
    """A licence (`operator` is "") or what joins several.

    >>> str(parse("mit or (GPL-2.0+ and Apache-2.0)"))
    '(Apache-2.0 AND GPL-2.0-or-later) OR MIT'
    """

    operator: str
    """"AND", "OR" or ""."""
    parts: tuple[Expression, ...] = ()
    """Sorted, each once."""
    name: str = ""
    """Of a licence, with its exception: `GPL-2.0-or-later WITH Classpath-exception-2.0`."""

    def __str__(self) -> str:
        if not self.operator:
            return self.name
        return f" {self.operator} ".join(f"({part})" if part.operator else part.name for part in self.parts)

    @property
    def names(self) -> tuple[str, ...]:
        """The licences in it, sorted, without exceptions."""
        if not self.operator:
            return (self.name.partition(" WITH ")[0],)
        return tuple(sorted({name for part in self.parts for name in part.names}))

    @property
    def strictness(self) -> Strictness:
        """What it asks: of a choice the least, of a conjunction the most."""
        if not self.operator:
            return STRICTNESS.get(self.names[0], Strictness.UNKNOWN)
        return (min if self.operator == "OR" else max)(part.strictness for part in self.parts)


@lru_cache(maxsize=4096)
def parse(text: str) -> Expression:
    """Parse an SPDX expression; the names of licences in any case, deprecated ones in today's form.

    Raises:
        NotAnExpression: it is none.
    """
    tokens, place = [], 0
    while place < len(text.rstrip()):
        match = _TOKEN.match(text, place)
        if match is None:
            raise NotAnExpression(f"not an SPDX expression at {text[place : place + 20]!r}")
        tokens.append(match[1] or match[2])
        place = match.end()
    expression, left = _choice(tokens, 0)
    if left:
        raise NotAnExpression(f"not an SPDX expression from {left[0]!r} on")
    return expression


def _choice(tokens: list[str], depth: int) -> tuple[Expression, list[str]]:
    part, tokens = _conjunction(tokens, depth)
    parts = [part]
    while tokens and tokens[0].upper() == "OR":
        part, tokens = _conjunction(tokens[1:], depth)
        parts.append(part)
    return _of("OR", parts), tokens


def _conjunction(tokens: list[str], depth: int) -> tuple[Expression, list[str]]:
    part, tokens = _one(tokens, depth)
    parts = [part]
    while tokens and tokens[0].upper() == "AND":
        part, tokens = _one(tokens[1:], depth)
        parts.append(part)
    return _of("AND", parts), tokens


def _one(tokens: list[str], depth: int) -> tuple[Expression, list[str]]:
    if not tokens or depth > _DEEPEST or tokens[0].upper() in {"AND", "OR", "WITH", ")"}:
        raise NotAnExpression("not an SPDX expression: a licence is missing")
    if tokens[0] == "(":
        inner, left = _choice(tokens[1:], depth + 1)
        if not left or left[0] != ")":
            raise NotAnExpression("not an SPDX expression: a parenthesis is open")
        return inner, left[1:]
    name, tokens = canonical(tokens[0]), tokens[1:]
    if len(tokens) > 1 and tokens[0].upper() == "WITH":
        return Expression("", name=f"{name} WITH {tokens[1]}"), tokens[2:]
    return Expression("", name=name), tokens


def canonical(name: str) -> str:
    """A licence's name as SPDX writes it today.

    >>> canonical("gpl-2.0+"), canonical("apache-2.0"), canonical("LicenseRef-Mine")
    ('GPL-2.0-or-later', 'Apache-2.0', 'LicenseRef-Mine')
    """
    match = _DEPRECATED.match(name)
    if match:
        return f"{match[1].upper()}-{'or-later' if match[2] else 'only'}"
    return _BY_FOLD.get(name.casefold()) or _BY_FOLD.get(name.rstrip("+").casefold()) or name


def _of(operator: str, parts: Iterable[Expression]) -> Expression:
    """Parts joined: nested ones of the same operator flattened, each once, sorted."""
    flat = {inner for part in parts for inner in (part.parts if part.operator == operator else (part,))}
    ordered = tuple(sorted(flat, key=str))
    return ordered[0] if len(ordered) == 1 else Expression(operator, ordered)


def join(expressions: Iterable[Expression]) -> Expression | None:
    """What is asked of who has a text under all of these; None of none.

    >>> str(join([parse("MIT"), parse("GPL-3.0"), parse("MIT")]))
    'GPL-3.0-only AND MIT'
    """
    expressions = list(expressions)
    return _of("AND", expressions) if expressions else None
