"""A data set's metadata as Croissant, the JSON-LD that data set search engines and loaders read.

    DataCard, artifact --croissant--> {"@context": ..., "@type": "sc:Dataset", "distribution": [...], ...}

The files are those of the artifact, each with its sha256; the record set has the columns of its documents.
Croissant has no fields for what was dropped or found, so these are in the description, in words, and in the
data card.

Source: Croissant 1.0, https://docs.mlcommons.org/croissant/docs/croissant-spec.html
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from gyrocompass.core.artifact import Artifact
from gyrocompass.data.curate.card import UNKNOWN, DataCard
from gyrocompass.data.document import DOCUMENT_SCHEMA

SPECIFICATION = "http://mlcommons.org/croissant/1.0"
_SPDX = "https://spdx.org/licenses/"

_CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileProperty": "cr:fileProperty",
    "fileObject": "cr:fileObject",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
_TYPES = {
    pa.string(): "sc:Text",
    pa.float64(): "sc:Float",
    pa.int64(): "sc:Integer",
    pa.timestamp("us", tz="UTC"): "sc:Date",
}
_DESCRIBED = {
    "id": "16 hex digits of the sha256 of source, path and content.",
    "kind": "text, chat, completion or preference.",
    "path": "Where the document stood, with ! after each archive that it was in.",
    "source": "The collection it belongs to.",
    "slice": "The part of the data that numbers are reported for.",
    "text": "The document; for other kinds than text, the answer.",
    "licence": "SPDX expression, where it is known.",
    "language": "Of the text, where it is known.",
    "content_hash": "sha256 of the content.",
    "file_hash": "sha256 of the file it was read from.",
    "time": "When it was written, as its source says it.",
}


def croissant(card: DataCard, dataset: Artifact, url: str | None = None) -> dict[str, Any]:
    """The metadata.

    Args:
        card: what there is to say.
        dataset: its files.
        url: where the data set is to be found; None: nowhere but in its store.
    """
    documents = [name for name in dataset.manifest.files if name.startswith("documents-")]
    return {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": SPECIFICATION,
        "name": card.name,
        "description": _description(card),
        "version": f"1.0.0+{card.root[:16]}",
        "datePublished": card.created_at[:10],
        "license": licence_urls(card) or ["https://spdx.org/licenses/"],
        "url": url or f"urn:gyrocompass:{card.dataset}",
        "identifier": card.root,
        "citeAs": f"{card.name}, Merkle root {card.root}",
        "creator": {"@type": "sc:Organization", "name": f"Gyrocompass {card.code_version}"},
        "inLanguage": [each.name for each in card.by["language"] if each.name != UNKNOWN],
        "isLiveDataset": False,
        "distribution": [
            *(_file(name, dataset) for name in documents),
            {
                "@type": "cr:FileSet",
                "@id": "documents",
                "name": "documents",
                "encodingFormat": "application/x-parquet",
                "includes": "documents-*.parquet",
            },
        ],
        "recordSet": [
            {
                "@type": "cr:RecordSet",
                "@id": "document",
                "name": "document",
                "description": f"One document each, {card.total.documents:,} in all.",
                "key": {"@id": "document/id"},
                "field": list(_fields()),
            }
        ],
    }


def licence_urls(card: DataCard) -> list[str]:
    """The licences of the documents, each identifier of each expression, as SPDX's own addresses."""
    names: dict[str, None] = {}
    for each in card.by["licence"]:
        if each.name != UNKNOWN:
            words = each.name.replace("(", " ").replace(")", " ").split()
            names |= dict.fromkeys(word for word in words if word not in ("AND", "OR", "WITH"))
    return [f"{_SPDX}{name}.html" for name in names if not name.startswith("LicenseRef-")]


def _description(card: DataCard) -> str:
    dropped = sum(each.documents for each in card.dropped)
    said = card.description.rstrip(".") + ". " if card.description else ""
    return (
        f"{said}{card.total.documents:,} documents ({card.total.bytes:,} bytes) of {card.read_documents:,} "
        f"read; {dropped:,} were dropped by rules, each with its reason in the ledger, and "
        f"{card.lost_share:.2%} of all records could not be read."
    )


def _file(name: str, dataset: Artifact) -> dict[str, Any]:
    entry = dataset.manifest.files[name]
    return {
        "@type": "cr:FileObject",
        "@id": name,
        "name": name,
        "contentUrl": name,
        "contentSize": f"{entry.bytes} B",
        "encodingFormat": "application/x-parquet",
        "sha256": entry.sha256,
    }


def _fields() -> Iterator[dict[str, Any]]:
    """The columns that are one value each."""
    for column in DOCUMENT_SCHEMA:
        kind = _TYPES.get(column.type)
        if kind is not None:
            yield {
                "@type": "cr:Field",
                "@id": f"document/{column.name}",
                "name": column.name,
                "description": _DESCRIBED.get(column.name, f"The column {column.name}."),
                "dataType": kind,
                "source": {"fileSet": {"@id": "documents"}, "extract": {"column": column.name}},
            }
