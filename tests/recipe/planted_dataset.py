"""A small data set with everything planted that a card and a report tell of, built by the pipeline itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa

from gyrocompass.core.progress import Progress
from gyrocompass.core.store import Store
from gyrocompass.data.curate.build import Builder
from gyrocompass.data.curate.card import Parts, open_parts
from gyrocompass.data.curate.config import build_from
from gyrocompass.data.curate.executor import LocalExecutor
from gyrocompass.data.curate.step import SPANS, RecordStep, register

HOSTILE = "<script>alert(1)</script>"
SECRET = "hunter2-very-secret"
EMAIL = "ann@example.org"


@register
class PlantedMarks(RecordStep):
    """Marks given words wherever they stand; under another label it is another finder."""

    name: ClassVar[str] = "planted_marks"
    words: dict[str, str]
    """Kind by word."""

    def annotate(self, documents: pa.RecordBatch) -> pa.RecordBatch:
        found = []
        for text in documents["text"].to_pylist():
            spans = []
            for word, kind in self.words.items():
                at = text.find(word)
                while at >= 0:
                    spans.append({"start": at, "end": at + len(word), "kind": kind, "score": 0.9})
                    at = text.find(word, at + 1)
            found.append(sorted(spans, key=lambda span: span["start"]))
        return pa.RecordBatch.from_arrays([documents["id"], pa.array(found, SPANS)], ["id", "spans"])


@register
class PlantedSurprisal(RecordStep):
    """Nats per byte that depend on the text's length alone."""

    name: ClassVar[str] = "planted_surprisal"

    def annotate(self, documents: pa.RecordBatch) -> pa.RecordBatch:
        nats = [1.0 + len(text) % 7 / 10 for text in documents["text"].to_pylist()]
        return pa.RecordBatch.from_arrays(
            [documents["id"], pa.array(nats, pa.float64())], ["id", "nats_per_byte"]
        )


@register
class PlantedClusters(RecordStep):
    """Texts that begin with "copy N" are a cluster named N."""

    name: ClassVar[str] = "planted_clusters"

    def annotate(self, documents: pa.RecordBatch) -> pa.RecordBatch:
        words = [text.split() for text in documents["text"].to_pylist()]
        names = [each[1] if each[0] == "copy" else None for each in words]
        return pa.RecordBatch.from_arrays([documents["id"], pa.array(names, pa.string())], ["id", "cluster"])


def records() -> list[dict[str, Any]]:
    """What is planted."""
    prose = [
        {"id": f"prose{n}", "text": f"Chapter {n}. {'All compasses point somewhere. ' * (n + 2)}"}
        for n in range(8)
    ]
    made: list[dict[str, Any]] = [
        *({**each, "slice": "prose/books", "language": "en", "licence": "CC-BY-SA-4.0"} for each in prose),
        {"id": "mail", "text": f"Write to {EMAIL} or to {EMAIL}.", "slice": "prose/mail", "language": "de"},
        {
            "id": "key",
            "text": f"password = '{SECRET}'  # {EMAIL}",
            "slice": "code",
            "licence": "MIT OR Apache-2.0",
        },
        {
            "id": "hostile",
            "text": f"{HOSTILE} & more <b>text</b>",
            "slice": "code",
            "licence": "MIT OR Apache-2.0",
        },
        {"id": "short", "text": f"tiny {EMAIL}", "slice": "prose/mail"},
        {
            "id": "quiz",
            "text": "What is the capital of Peru? Lima, says the benchmark.",
            "slice": "prose/books",
        },
    ]
    made += [
        {
            "id": f"copy{n}",
            "text": f"copy {HOSTILE} a text that stands in many places",
            "slice": "prose/books",
        }
        for n in range(4)
    ]
    return made


def build(folder: Path) -> tuple[Store, Parts]:
    """Build it."""
    lines = [json.dumps(record) for record in records()] + ['{"txt": "no text"}', "{not json", ""]
    (folder / "planted.jsonl").write_text("\n".join(lines) + "\n")
    return build_from_config(
        folder,
        {
            "name": "planted",
            "description": f"A data set for tests {HOSTILE}.",
            "sources": [{"ingest": {"path": str(folder / "planted.jsonl"), "name": "planted"}}],
            "steps": [
                {"planted_marks": {"as": "personal", "words": {EMAIL: "email"}}},
                {"planted_marks": {"as": "secrets", "words": {SECRET: "secret.password"}}},
                {"planted_marks": {"as": "contamination", "words": {"capital of Peru": "substring:quiz#17"}}},
                {"planted_marks": {"as": "passages", "words": {"compasses": "repeated"}}},
                "planted_clusters",
                "planted_surprisal",
            ],
            "rules": [
                {"drop": {"column": "n_bytes", "below": 25}},
                {"drop": {"column": "contamination.spans"}},
                {"keep_one": {"column": "planted_clusters.cluster"}},
                {"mask": {"column": "personal.spans"}},
            ],
            "max_quarantined_share": 0.2,
        },
    )


def build_from_config(folder: Path, config: dict[str, Any]) -> tuple[Store, Parts]:
    """Build what a YAML file would say."""
    store = Store(folder / "store")
    with LocalExecutor(1) as executor, Progress(quiet=True) as progress:
        built = Builder(store, executor, progress).build(build_from(config, "planted"))
    return store, open_parts(store, built.dataset)
