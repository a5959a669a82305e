"""What the pages show, gathered from the store: numbers first, and how each was counted."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sqlalchemy import select

from gyrocompass.core.store import Store
from gyrocompass.core.tables_registry import AliasRow, RolloutRow, VersionRow
from gyrocompass.core.tables_serving import EventRow, ReviewRow, VerdictRow
from gyrocompass.measure.drift import Watched, watch
from gyrocompass.measure.intervals import Estimate
from gyrocompass.measure.ledger import Ledger
from gyrocompass.serve.agreement import Looked, error_rate, kappa
from gyrocompass.serve.events import read_events
from gyrocompass.serve.feedback import is_right
from gyrocompass.serve.review import final

MOST_EVENTS = 20_000
"""That an overview looks at: the last of its span."""


class Overview(NamedTuple):
    """How the server does."""

    days: float
    events: int
    refused: int
    """Requests that got an error."""
    latency_s: Mapping[str, float]
    """p50, p95, p99 of answers."""
    first_token_s: Mapping[str, float]
    outcomes: Mapping[str, int]
    confidence: Sequence[int]
    """Answers by tenth of confidence."""
    by_hour: Sequence[tuple[float, float]]
    """Hours ago, and requests in that hour."""
    error: Estimate
    """Share of wrong ones among answers given without a person, from those drawn for a look."""
    looked: int
    agreement: Estimate
    """Kappa of those who looked at the same items."""
    pairs: int
    drift: Sequence[Watched]
    beside: Sequence[Beside]
    """All, then slice by slice; empty where no answer names a model whose ledger is here."""


class Beside(NamedTuple):
    """What is asked, beside what the model was trained on."""

    slice: str
    """Empty: all."""
    answers: int
    share: float
    """Of answers."""
    trained_share: float
    """Of the training's tokens."""
    surprisal: float
    """Nats per token of answers, in the mean."""
    trained_surprisal: float | None
    """Nats per token of the training's ledger; None: it has no such slice."""
    entropy: float | None
    trained_entropy: float | None


def overview(store: Store, days: float = 7.0) -> Overview:
    """The last days."""
    now = time.time()
    events = list(read_events(store.database, now - days * 86400))[-MOST_EVENTS:]
    given = [event for event in events if event["status"] == 200]
    times = [event["total_s"] for event in given]
    first = [event["first_token_s"] for event in given]
    confidences = [event["confidence"] for event in given if event["confidence"] is not None]
    tenths = np.histogram(confidences, bins=10, range=(0, 1))[0].tolist()
    hours = Counter(int((now - event["at"]) // 3600) for event in events)
    looked, pairs = _looked_at(store, now - days * 86400)
    return Overview(
        days,
        len(events),
        len(events) - len(given),
        _quantiles(times),
        _quantiles(first),
        dict(Counter(event["outcome"] or "answer" for event in given).most_common()),
        tenths,
        [(0.0 - hour, float(hours[hour])) for hour in range(min(24 * 7, int(days * 24)) - 1, -1, -1)],
        error_rate(looked),
        len(looked),
        kappa(pairs),
        len(pairs),
        watch(given) if given else [],
        _beside(store, given),
    )


def _beside(store: Store, given: Sequence[Mapping[str, Any]]) -> list[Beside]:
    """Answers of the model that answered last, beside its training's ledger, which is the baseline."""
    model = next((event["model"] for event in reversed(given) if event["mean_logprob"] is not None), "")
    path = store.folder(model) / "ledger.parquet" if model else None
    if path is None or not path.is_file():
        return []
    mine = [event for event in given if event["model"] == model and event["mean_logprob"] is not None]
    ledger = Ledger.load(path)
    trained = {"": ledger.total} | dict(ledger.items("slice"))
    names = ["", *sorted({event["slice"] for event in mine} - {""})]
    found = []
    for name in names:
        own = [event for event in mine if name in ("", event["slice"])]
        entropies = [event["mean_entropy"] for event in own if event["mean_entropy"] is not None]
        sums = trained.get(name)
        found.append(
            Beside(
                name,
                len(own),
                len(own) / len(mine),
                0.0 if sums is None else _ratio(sums.count, trained[""].count),
                -float(np.mean([event["mean_logprob"] for event in own])),
                None if sums is None else _ratio(sums.value, sums.count),
                float(np.mean(entropies)) if entropies else None,
                None if sums is None else _ratio(sums.entropy, sums.entropy_count),
            )
        )
    return found


def _ratio(above: float, below: float) -> float:
    return above / below if below else 0.0


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    found = np.quantile(values, [0.5, 0.95, 0.99]).tolist()
    return dict(zip(("p50", "p95", "p99"), found, strict=True))


def _looked_at(store: Store, since: float) -> tuple[list[Looked], list[tuple[str, str]]]:
    """What people said of answers that were given anyway, and pairs of verdicts on one item."""
    with store.database.read() as connection:
        rows = connection.execute(select(ReviewRow.__table__).where(ReviewRow.at >= since))
        items = {row.id: dict(row._mapping) for row in rows}
        verdicts: dict[str, list[dict[str, Any]]] = {}
        query = select(VerdictRow.__table__).where(VerdictRow.at >= since).order_by(VerdictRow.at)
        for row in connection.execute(query):
            verdicts.setdefault(row.review_id, []).append(dict(row._mapping))
    looked = [
        Looked(not is_right(final(item, verdicts[name])), item["inclusion"])
        for name, item in items.items()
        if item["state"] == "decided" and not item["urgent"] and name in verdicts
    ]
    pairs = [(said[0]["verdict"], said[1]["verdict"]) for said in verdicts.values() if len(said) > 1]
    return looked, pairs


def models(store: Store) -> list[dict[str, Any]]:
    """Model artifacts, the newest first, with what they were made from."""
    found = []
    for summary in store.artifacts():
        if summary.kind == "model":
            artifact = store.open(summary.id, verify=False)
            found.append(
                {
                    "id": summary.id,
                    "made": artifact.manifest.created_at[:16].replace("T", " "),
                    "by": artifact.manifest.recipe.get("kind", ""),
                    "parents": artifact.manifest.parents,
                    "counts": artifact.manifest.counts,
                }
            )
    return sorted(found, key=lambda model: model["made"], reverse=True)


def registered(store: Store) -> list[dict[str, Any]]:
    """Versions of every name, the newest first, with their aliases and how their trials on users went."""
    with store.database.read() as connection:
        aliases = connection.execute(select(AliasRow.__table__)).all()
        trials = connection.execute(select(RolloutRow.__table__).order_by(RolloutRow.at)).all()
        rows = connection.execute(select(VersionRow.__table__).order_by(VersionRow.at.desc())).all()
    found = []
    for row in rows:
        mine = (row.name, row.version)
        tried = [one for one in trials if (one.name, one.version) == mine]
        found.append(
            {
                "name": f"{row.name}:{row.version}",
                "aliases": sorted(one.alias for one in aliases if (one.name, one.version) == mine),
                "artifact": row.artifact_id,
                "policy": row.policy_id or "",
                "trials": [f"{one.plan['mode']}: {one.state} {one.why}".strip() for one in tried],
                "by": row.by,
            }
        )
    return found


def reports(store: Store) -> list[str]:
    """Pages that runs wrote, as run/name."""
    return sorted(f"{path.parent.name}/{path.stem}" for path in (store.root / "runs").glob("*/*.html"))


def report_path(store: Store, name: str) -> Path | None:
    """The file of a report that `reports` names; None for any other."""
    return store.root / "runs" / f"{name}.html" if name in reports(store) else None


class Curve(NamedTuple):
    """How a training went, or goes."""

    name: str
    running: bool
    steps: int
    loss: float | None
    tokens_per_second: float | None
    slices: Mapping[str, Sequence[tuple[float, float]]]
    """Nats per token by slice, and the loss as "all"."""


_POINTS = 200


def curves(store: Store, most: int = 8) -> list[Curve]:
    """The newest trainings, those that are under way first."""
    running = [(path, True) for path in (store.root / "work").glob("*/metrics.jsonl")]
    done = [(path, False) for path in (store.root / "artifacts").glob("model-*/metrics.jsonl")]
    newest = sorted([*running, *done], key=lambda one: (one[1], one[0].stat().st_mtime), reverse=True)
    return [found for path, is_running in newest[:most] if (found := _curve(path, is_running)) is not None]


def _curve(path: Path, running: bool) -> Curve | None:
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break  # the line that is being written
    if not rows:
        return None
    slices: dict[str, list[tuple[float, float]]] = {}
    for row in rows[:: max(1, len(rows) // _POINTS)]:
        for name, nats in {"all": row.get("loss"), **(row.get("nll_nats") or {})}.items():
            if nats is not None:
                slices.setdefault(name, []).append((float(row["step"]), float(nats)))
    last = rows[-1]
    return Curve(
        path.parent.name, running, last["step"], last.get("loss"), last.get("tokens_per_second"), slices
    )


def event_of_review(store: Store, request_id: str) -> dict[str, Any] | None:
    """The event of an item's request."""
    with store.database.read() as connection:
        row = connection.execute(select(EventRow.__table__).where(EventRow.request_id == request_id)).first()
        return None if row is None else dict(row._mapping)
