"""What may be used under which licence, and whom a data set must name.

    expression, LicencePolicy --verdict--> allowed | attribution | refused | unknown
    rows of a data set        --attribution_text--> the file that goes with whatever is made from it

A policy names licences (`MIT`), families by pattern (`CC-BY-*`) or degrees of strictness (`weak_copyleft`,
see `spdx.Strictness`). The entry that says most decides: a licence's own name before a pattern, a pattern
before a degree, and among patterns the longer. Of a choice (OR) the best verdict counts, of a conjunction the
worst.
"""

from __future__ import annotations

import fnmatch
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import field_validator, model_validator

from gyrocompass.core.config import Config, load_yaml, parse
from gyrocompass.core.errors import did_you_mean
from gyrocompass.data.curate import spdx
from gyrocompass.data.curate.spdx import Expression, Strictness

LicenceVerdict = Literal["allowed", "attribution", "refused", "unknown"]

_WORST_LAST: tuple[LicenceVerdict, ...] = ("allowed", "attribution", "unknown", "refused")
_DEGREES = {level.name.lower(): level for level in Strictness}


class LicencePolicy(Config):
    """Which licences are taken.

    Args:
        allowed: may be used without more.
        attribution: may be used if authors and notices are named.
        refused: may not be used.
        others: what is said of a licence that no entry covers.
        unlicensed: what is said of a document without evidence.
    """

    allowed: tuple[str, ...] = ("public_domain",)
    attribution: tuple[str, ...] = ("permissive", "attribution", "weak_copyleft")
    refused: tuple[str, ...] = (
        "strong_copyleft",
        "network_copyleft",
        "non_commercial",
        "no_derivatives",
        "proprietary",
    )
    others: LicenceVerdict = "unknown"
    unlicensed: LicenceVerdict = "unknown"

    @field_validator("allowed", "attribution", "refused")
    @classmethod
    def _entries_are_known(cls, entries: tuple[str, ...]) -> tuple[str, ...]:
        known = [*spdx.STRICTNESS, *_DEGREES]
        for entry in entries:
            is_pattern = "*" in entry and any(fnmatch.fnmatchcase(name, entry) for name in spdx.STRICTNESS)
            if not (is_pattern or entry in known or entry.startswith("LicenseRef-")):
                raise ValueError(f"no licence is called {entry!r}{did_you_mean(entry, known)}")
        return entries

    @model_validator(mode="after")
    def _entries_stand_once(self) -> LicencePolicy:
        entries = [*self.allowed, *self.attribution, *self.refused]
        twice = sorted({entry for entry in entries if entries.count(entry) > 1})
        if twice:
            raise ValueError(f"named more than once: {', '.join(twice)}")
        return self

    def verdict(self, expression: str | None) -> LicenceVerdict:
        """What is said of a document under this expression.

        >>> LicencePolicy().verdict("MIT OR GPL-3.0-only"), LicencePolicy().verdict("MIT AND GPL-3.0-only")
        ('attribution', 'refused')
        """
        if expression is None:
            return self.unlicensed
        return self._of(spdx.parse(expression))

    def _of(self, expression: Expression) -> LicenceVerdict:
        if expression.operator:
            verdicts = sorted((self._of(part) for part in expression.parts), key=_WORST_LAST.index)
            return verdicts[0] if expression.operator == "OR" else verdicts[-1]
        degree = expression.strictness.name.lower()
        best: tuple[int, LicenceVerdict] = (-1, self.others)
        for verdict in ("refused", "attribution", "allowed"):
            for entry in getattr(self, verdict):
                weight = _weight(entry, expression.names[0], expression.name, degree)
                best = max(best, (weight, verdict), key=lambda found: found[0])
        return best[1]


def _weight(entry: str, name: str, full_name: str, degree: str) -> int:
    """How closely an entry speaks of a licence: not at all (-1), by its degree (0), by a pattern, by name."""
    if entry in (name, full_name):
        return 1000
    if "*" in entry:
        return len(entry) if fnmatch.fnmatchcase(name, entry) else -1
    return 0 if entry == degree else -1


def read_policy(path: Path) -> LicencePolicy:
    """A policy file: YAML with the fields of `LicencePolicy`.

    Raises:
        ConfigError: it is none, with a line for each mistake.
    """
    return parse(LicencePolicy, load_yaml(path))


class Attributed(NamedTuple):
    """What an attribution needs of one document."""

    source: str
    path: str
    expression: str | None
    copyrights: tuple[str, ...] = ()


def attribution_text(documents: Iterable[Attributed], title: str = "Attribution") -> str:
    """The attribution of whatever is made from these documents: licence by licence, source by source.

    It lists every licence with its holders of copyright and how many documents they stand in; paths are given
    where a source has at most twenty. The same documents give the same text in any order.

    >>> print(attribution_text([Attributed("docs", "a.md", "CC-BY-4.0", ("2020 Anna",))]))
    Attribution
    ===========
    <BLANKLINE>
    CC-BY-4.0
    ---------
    <BLANKLINE>
    docs: 1 document
      a.md
      Copyright 2020 Anna
    <BLANKLINE>
    """
    by_licence: dict[str, dict[str, list[Attributed]]] = defaultdict(lambda: defaultdict(list))
    for document in documents:
        by_licence[document.expression or "No licence known"][document.source].append(document)
    lines = [title, "=" * len(title), ""]
    for licence, by_source in sorted(by_licence.items()):
        lines += [licence, "-" * len(licence), ""]
        for source, found in sorted(by_source.items()):
            lines.append(f"{source}: {len(found)} document{'s' * (len(found) != 1)}")
            if len(found) <= 20:
                lines += [f"  {path}" for path in sorted({document.path for document in found})]
            holders = sorted({holder for document in found for holder in document.copyrights})
            lines += [f"  Copyright {holder}" for holder in holders]
            lines.append("")
    return "\n".join(lines)
