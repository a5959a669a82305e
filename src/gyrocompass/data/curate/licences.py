"""Licences of documents: what each says of itself, else what its package says, and all that copies say.

    documents --signatures--> evidence of each, and whether it speaks for a package
              --resolve-----> expression, origin, conflict, verdict of each

A document's own evidence (see `licence_evidence`) counts most, then what the source declared, then the
licence file or package metadata in the nearest folder above it, within its source. Copies of one text, and
what an earlier step found to be duplicates, are then under all the licences that any copy has evidence of
(`spdx.join`): a text is not freed by standing somewhere else too. A copy without evidence adds nothing.

Left out: licences of parts of a document; and whether who named a licence had the right to.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa

from gyrocompass.data.curate import licence_evidence, spdx
from gyrocompass.data.curate.licence_evidence import Evidence, conclude
from gyrocompass.data.curate.licence_policy import LicencePolicy
from gyrocompass.data.curate.step import CorpusAccess, GlobalStep, register

_DECLARED = 0.85
"""Score of what the source declared: above a notice, below a licence's own words."""

_SIGNATURES = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("folder", pa.string()),
        ("expression", pa.string()),
        ("score", pa.float32()),
        ("origin", pa.string()),
        ("conflict", pa.bool_()),
        ("is_package", pa.bool_()),
        ("copyrights", pa.list_(pa.string())),
        ("alike", pa.list_(pa.string())),
    ]
)
_RESOLVED = pa.schema(
    [
        ("id", pa.string()),
        ("expression", pa.string()),
        ("score", pa.float32()),
        ("origin", pa.string()),
        ("conflict", pa.bool_()),
        ("strictness", pa.string()),
        ("verdict", pa.string()),
        ("copyrights", pa.list_(pa.string())),
    ]
)


class _Found(NamedTuple):
    """A licence with its standing."""

    expression: str
    score: float
    origin: str
    conflict: bool


@register
class Licences(GlobalStep):
    """Finds licences and says what the policy says of them.

    Args:
        policy: which licences are taken.
        classify: ask the package `licenseclassifier` at licence files and notices.
        clusters: columns of earlier steps that name duplicates, such as `fuzzy.cluster`.
    """

    name: ClassVar[str] = "licences"

    policy: LicencePolicy = LicencePolicy()
    classify: bool = False
    clusters: tuple[str, ...] = ()

    def reads(self) -> tuple[str, ...]:
        """The columns that name duplicates."""
        return self.clusters

    def signatures(self, documents: pa.RecordBatch) -> pa.RecordBatch:
        """The evidence in each document, its folder, its copyright lines, and what it is a copy of.

        Raises:
            MissingDependency: a classifier is asked for and not installed.
        """
        columns = ["id", "text", "path", "source", "licence", "content_hash", *self.clusters]
        rows = zip(*(documents.column(name).to_pylist() for name in columns), strict=True)
        return pa.RecordBatch.from_pylist([self._signature(*row) for row in rows], _SIGNATURES)

    def _signature(
        self,
        id_: str,
        text: str,
        path: str,
        source: str,
        declared: str | None,
        content_hash: str,
        *clusters: str | None,
    ) -> dict[str, Any]:
        evidence = licence_evidence.find(text, path, self.classify)
        expression = licence_evidence.expression_of(declared) if declared else None
        if expression:
            evidence = [*evidence, Evidence("declared", expression, _DECLARED, 0, 0)]
        concluded, score, conflict = conclude(evidence)
        best = max(evidence, key=lambda item: item.score, default=None)
        folder = PurePosixPath(path).parent
        return {
            "id": id_,
            "source": source,
            "folder": str(folder.parent if folder.name == "LICENSES" else folder),
            "expression": concluded,
            "score": score,
            "origin": best.kind if best else None,
            "conflict": conflict,
            "is_package": licence_evidence.is_licence_file(path) or licence_evidence.is_metadata_file(path),
            "copyrights": licence_evidence.copyrights(text),
            "alike": [
                f"content {content_hash}",
                *(f"{n} {c}" for n, c in zip(self.clusters, clusters, strict=True) if c),
            ],
        }

    def resolve(self, signatures: Iterator[pa.RecordBatch], corpus: CorpusAccess) -> pa.RecordBatch:
        """`expression`, `score`, `origin`, `conflict`, `strictness`, `verdict` and `copyrights`.

        `origin` is the kind of evidence, `package` for a folder's, or `copy` where duplicates said more.
        """
        rows = [row for batch in signatures for row in batch.to_pylist()]
        packages = _packages(rows)
        own = [_own(row) or _inherited(packages, row["source"], row["folder"]) for row in rows]
        found = _with_copies(own, [row["alike"] for row in rows])
        return pa.RecordBatch.from_pylist(
            [self._resolved(row, licence) for row, licence in zip(rows, found, strict=True)], _RESOLVED
        )

    def _resolved(self, row: dict[str, Any], found: _Found | None) -> dict[str, Any]:
        expression = found.expression if found else None
        strictness = spdx.parse(expression).strictness.name.lower() if expression else None
        verdict = {"strictness": strictness, "verdict": self.policy.verdict(expression)}
        kept = {"id": row["id"], "copyrights": row["copyrights"]}
        return (found._asdict() if found else {}) | kept | verdict


def _own(row: dict[str, Any]) -> _Found | None:
    if row["expression"] is None:
        return None
    return _Found(row["expression"], row["score"], row["origin"], row["conflict"])


def _packages(rows: list[dict[str, Any]]) -> dict[tuple[str, str], _Found]:
    """What licence files and metadata say, by source and folder."""
    speaking: dict[tuple[str, str], list[Evidence]] = defaultdict(list)
    for row in rows:
        if row["is_package"] and row["expression"]:
            said = Evidence("package", row["expression"], row["score"], 0, 0)
            speaking[row["source"], row["folder"]].append(said)
    packages = {}
    for place, evidence in speaking.items():
        expression, score, conflict = conclude(evidence)
        assert expression is not None
        packages[place] = _Found(expression, score, "package", conflict)
    return packages


def _inherited(packages: dict[tuple[str, str], _Found], source: str, folder: str) -> _Found | None:
    """What the nearest folder above says."""
    for parent in (folder, *map(str, PurePosixPath(folder).parents)):
        if (source, parent) in packages:
            return packages[source, parent]
    return None


def _with_copies(own: list[_Found | None], alike: list[list[str]]) -> list[_Found | None]:
    """Each licence joined with those of its copies; documents that share a name in `alike` are copies."""
    leaders = _components(alike)
    gathered: dict[int, set[str]] = defaultdict(set)
    for leader, found in zip(leaders, own, strict=True):
        if found:
            gathered[leader].add(found.expression)
    joined: list[_Found | None] = []
    for leader, found in zip(leaders, own, strict=True):
        expressions = gathered.get(leader)
        expression = str(spdx.join(map(spdx.parse, sorted(expressions)))) if expressions else None
        if expression is None or (found and found.expression == expression):
            joined.append(found)
        else:
            score = found.score if found else 0.5
            joined.append(
                _Found(expression, score, "copy", (found is not None) or len(expressions or ()) > 1)
            )
    return joined


def _components(alike: list[list[str]]) -> list[int]:
    """For each document the first of those it is connected with."""
    leader = np.arange(len(alike))
    first: dict[str, int] = {}

    def find(row: int) -> int:
        while leader[row] != row:
            leader[row] = leader[leader[row]]
            row = int(leader[row])
        return row

    for row, names in enumerate(alike):
        for name in names:
            a, b = find(first.setdefault(name, row)), find(row)
            leader[max(a, b)] = min(a, b)
    return [find(row) for row in range(len(alike))]
