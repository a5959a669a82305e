"""A summary of training content, laid out as the European Commission's template asks it of model providers.

    DataCard --training_summary--> Markdown

The template (Article 53(1)(d) of Regulation (EU) 2024/1689; published on 24 July 2025) has three sections:
general information, a list of data sources, and relevant aspects of data processing. What the data set knows
is filled in; what only the provider knows is marked as such, in [brackets], and never guessed. It is a draft
for the provider, and no legal advice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gyrocompass.data.curate.card import (
    UNKNOWN,
    DataCard,
    canary_lines,
    counted_table,
    escaped,
    findings_lines,
    markdown_table,
)
from gyrocompass.data.curate.optout import OPTED_OUT

_TO_FILL = "[for the provider to fill in]"
_KINDS = {
    "stdlib": "Publicly available: the standard library that every Python ships.",
    "debian": "Publicly available: documentation of Debian packages.",
    "datasets": "A saved data set.",
    "parquet": "A data set in Parquet.",
    "jsonl": "A data set in JSON lines.",
    "files": "Files of the provider.",
    "ingest": "Raw files: archives, pages, logs and tables.",
}


def training_summary(card: DataCard) -> str:
    """The summary as Markdown."""
    lines = [
        f"# Summary of training content: {escaped(card.name)}",
        "",
        "*A draft after the template of the European Commission for Article 53(1)(d) of Regulation (EU) "
        "2024/1689. Brackets mark what only the provider can say.*",
        "",
        "## 1. General information",
        "",
        "### 1.1 Provider",
        "",
        *markdown_table(("", ""), [("name and contact", _TO_FILL), ("authorised representative", _TO_FILL)]),
        "",
        "### 1.2 Model",
        "",
        *markdown_table(
            ("", ""),
            [
                ("versions trained on this data set", _TO_FILL),
                ("placed on the Union market on", _TO_FILL),
                ("data set", card.dataset),
                ("Merkle root of its documents", card.root),
                ("made", card.created_at),
            ],
        ),
        "",
        "### 1.3 Modalities, size and characteristics",
        "",
        f"Text alone. {card.total.documents:,} documents, {card.total.bytes:,} bytes of UTF-8"
        + (
            "."
            if card.total.tokens is None
            else f", {card.total.tokens:,} tokens ({_size(card.total.tokens)})."
        ),
        "",
        *counted_table("slice", card.by["slice"], card.total),
        "",
        f"Languages: {_languages(card)}.",
        "",
        "Latest date of data acquisition: "
        + card.created_at[:10]
        + ", when the data set was made, or earlier.",
        "",
        "## 2. List of data sources",
        "",
        *_sources(card),
        "",
        *counted_table("source", card.by["source"], card.total),
        "",
        "Data crawled by the provider: "
        + _TO_FILL
        + ". User data: "
        + _TO_FILL
        + ". Synthetic data: "
        + _TO_FILL
        + ".",
        "",
        "## 3. Data processing",
        "",
        "### 3.1 Respect of reservations from the text and data mining exception",
        "",
        *_reservations(card),
        "",
        "Licences of what is in it:",
        "",
        *counted_table("licence", card.by["licence"], card.total),
        "",
        "### 3.2 Removal of illegal content",
        "",
        *_removals(card),
        "",
        "### 3.3 Other",
        "",
        "Personal data:",
        "",
        *findings_lines(card, "personal"),
        "",
        "Secrets:",
        "",
        *findings_lines(card, "secrets"),
        "",
        *(["How much the finders find:", "", *canary_lines(card), ""] if card.canaries else []),
        "Contamination with benchmarks:",
        "",
        *findings_lines(card, "contamination"),
    ]
    return "\n".join(lines) + "\n"


def _size(tokens: int) -> str:
    """The template's size classes.

    >>> _size(5_000_000), _size(2_000_000_000)
    ('less than 1 billion tokens', '1 billion to 10 trillion tokens')
    """
    if tokens > 10e12:
        return "more than 10 trillion tokens"
    return "1 billion to 10 trillion tokens" if tokens >= 1e9 else "less than 1 billion tokens"


def _languages(card: DataCard) -> str:
    of = max(card.total.bytes, 1)
    shares = [f"{escaped(each.name)} {each.bytes / of:.1%}" for each in card.by["language"]]
    return ", ".join(shares) or UNKNOWN


def _sources(card: DataCard) -> Iterator[str]:
    for source in card.sources:
        ((kind, options),) = source.items()
        yield f"- {_KINDS.get(kind, kind)} {escaped(_place(options))}".rstrip()


def _place(options: Mapping[str, Any]) -> str:
    where = options.get("name") or options.get("path") or options.get("root")
    return f"({where})" if where else ""


def _reservations(card: DataCard) -> Iterator[str]:
    opted_out = sum(count for reason, count in card.skipped.items() if reason == OPTED_OUT)
    if opted_out:
        yield f"Left out before anything was read of them: {opted_out:,} documents on opt-out lists."
    else:
        yield "No document that was found is on an opt-out list of this build."
    objected = sum(each.documents for each in card.dropped if "objections" in each.column)
    if objected:
        yield f"Dropped by rules for a reservation that was found in or for them: {objected:,} documents."
    yield f"Machine-readable reservations at the sources (robots.txt and the like): {_TO_FILL}."


def _removals(card: DataCard) -> Iterator[str]:
    rows = [(each.title, f"{each.documents:,}", f"{each.bytes:,}") for each in card.dropped]
    yield "What rules took out, for whatever reason:"
    yield ""
    yield from markdown_table(("rule", "documents", "bytes"), rows) if rows else ["No rule took any."]
