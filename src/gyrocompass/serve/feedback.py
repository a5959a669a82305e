"""Verdicts as data: what people said of answers becomes what the next model learns from.

    decided reviews --export--> an artifact of the kind "feedback", made from the models that answered
        sft.jsonl          {"prompt": messages, "completion": the answer that was let through}
        preference.jsonl   {"prompt": messages, "chosen": the edit, "rejected": the answer}
        kto.jsonl          {"prompt": messages, "completion": an answer, "label": whether it was good}
        labels.jsonl       {"confidence", "mean_logprob", ..., "correct", "slice", "inclusion"}

These are formats that `data.records` reads, and others' trainers do. Each record says beside it where it is
from: the review, the request, the model, a hash of who decided, when, and that the user agreed. What a user
did not agree to is left out and counted. Labels carry no text, so they need no consent.

An edit says three things: the text is good (sft), it is better than the answer (preference), and the answer
was not good enough (kto). A preference between answers names the chosen one against each of the others.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

from sqlalchemy import select

from gyrocompass.core.artifact import Artifact
from gyrocompass.core.config import config_hash
from gyrocompass.core.errors import BadInput
from gyrocompass.core.store import Store
from gyrocompass.core.tables_serving import ReviewRow, VerdictRow
from gyrocompass.serve.review import final, text_after

FILES = ("sft", "preference", "kto", "labels")


class Exported(NamedTuple):
    """What came of an export."""

    artifact: Artifact
    records: Mapping[str, int]
    """By file."""
    without_consent: int
    """Reviews whose texts were left out."""


def export(store: Store, *, since: float = 0.0, until: float = math.inf, all_texts: bool = False) -> Exported:
    """Write what was decided from a time on.

    Args:
        store: with the reviews.
        since: seconds since 1970.
        until: the same; what was decided later is left for another time.
        all_texts: also those whose users did not agree; for texts that are one's own.

    Raises:
        BadInput: nothing was decided.
    """
    items = [item for item in _decided(store, since) if item["said"]["at"] < until]
    if not items:
        raise BadInput("nothing is decided yet", where=store.root, fix="decide on some answers at /review")
    known = {artifact.id for artifact in store.artifacts()}
    models = sorted({item["model"] for item in items} & known)
    roles = ["model"] if len(models) == 1 else [f"model_{place}" for place in range(len(models))]
    parents = {role: store.open(one, verify=False) for role, one in zip(roles, models, strict=True)}
    counts: Counter[str] = Counter()
    without = 0
    recipe = {"kind": "feedback", "all_texts": all_texts, "since": since}
    key = config_hash(recipe | {"reviews": [item["id"] for item in items]})
    with store.create(key, "feedback", parents=parents, recipe=recipe) as draft:
        with ExitStack() as open_files:
            files = {
                name: open_files.enter_context((draft.path / f"{name}.jsonl").open("w", encoding="utf-8"))
                for name in FILES
            }
            for item in items:
                may = all_texts or item["consent"]
                without += not may
                for name, record in _records(item):
                    if may or name == "labels":
                        files[name].write(json.dumps(record, ensure_ascii=False) + "\n")
                        counts[name] += 1
        draft.counts |= {name: counts[name] for name in FILES} | {"without_consent": without}
        draft.documents = ()
    return Exported(draft.artifact, {name: counts[name] for name in FILES}, without)


def _decided(store: Store, since: float) -> Iterator[dict[str, Any]]:
    """Items with their verdicts, the oldest decision first."""
    with store.database.read() as connection:
        query = select(ReviewRow.__table__).where(ReviewRow.state == "decided")
        items = {row.id: dict(row._mapping) for row in connection.execute(query)}
        verdicts: dict[str, list[dict[str, Any]]] = {name: [] for name in items}
        for row in connection.execute(select(VerdictRow.__table__).order_by(VerdictRow.at, VerdictRow.id)):
            if row.review_id in verdicts:
                verdicts[row.review_id].append(dict(row._mapping))
    found = [item | {"said": final(item, verdicts[name])} for name, item in items.items()]
    found.sort(key=lambda item: (item["said"]["at"], item["id"]))
    yield from (item for item in found if item["said"]["at"] >= since)


def _records(item: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """File and record of all that an item teaches."""
    said, answer = item["said"], item["answer"]
    prompt = item["messages"] or item["prompt"]
    beside = {
        "source": f"review:{item['id']}",
        "licence": "consent of the user" if item["consent"] else "",
        "group": hashlib.sha256(item["prompt"].encode()).hexdigest()[:16],
        **({"slice": item["slice"]} if item["slice"] else {}),
        "provenance": {
            "review": item["id"],
            "request": item["request_id"],
            "model": item["model"],
            "decided_by": hashlib.sha256(said["by"].encode()).hexdigest()[:16],
            "decided_at": said["at"],
            "verdict": said["verdict"],
            "consent": item["consent"],
        },
    }
    good = text_after(dict(item), said)
    if good:
        yield "sft", {"prompt": prompt, "completion": good, **beside}
    if said["verdict"] == "edit" and answer.strip():
        yield "preference", {"prompt": prompt, "chosen": good, "rejected": answer, **beside}
    if said["verdict"] == "prefer":
        for other in [answer, *item["candidates"]]:
            if other.strip() and other != good:
                yield "preference", {"prompt": prompt, "chosen": good, "rejected": other, **beside}
    if answer.strip():
        yield "kto", {"prompt": prompt, "completion": answer, "label": is_right(said), **beside}
    if said["verdict"] == "edit":
        yield "kto", {"prompt": prompt, "completion": good, "label": True, **beside}
    logprobs = [token[1] for token in item["tokens"] if token[1] is not None]
    yield (
        "labels",
        {
            "item": item["id"],
            "slice": item["slice"],
            "correct": is_right(said),
            "confidence": item["confidence"],
            "calibrator": item["calibrator"],
            "sequence_logprob": sum(logprobs) if logprobs else None,
            "mean_logprob": sum(logprobs) / len(logprobs) if logprobs else None,
            "min_logprob": min(logprobs, default=None),
            "tokens": len(item["tokens"]),
            "inclusion": item["inclusion"],
            "model": item["model"],
        },
    )


def is_right(verdict: Mapping[str, Any]) -> bool:
    """Whether a verdict calls the answer itself right."""
    preferred = verdict["verdict"] == "prefer" and verdict["preferred"] == 0
    return bool(preferred or verdict["verdict"] == "approve")
