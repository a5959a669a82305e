"""Forgetting a user: all that a server kept of them, what was made of it, and what learned from that.

    trace(store, user) --> Traces              events, reviews, feedback, documents, models; changes nothing
    forget(builder, traces) --> Forgotten      deleted, opted out, marked; one act in the chain

A user is known by a keyed hash alone (the key is the store's), so whoever forgets them has to know the name
that requests gave. The order is: documents made of what they said are opted out and taken out of stored data
(`data.curate.forget`), artifacts of feedback with their texts are deleted, rows go from the database, and
models that learned from any of it are marked, so that a loop trains their name again from a version that did
not. That the name is gone from a model nobody can see in the weights; canaries say how exposed it is before
and after (`gyro exposure`).
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import delete, func, select

from gyrocompass.core.acts import note
from gyrocompass.core.errors import BadInput
from gyrocompass.core.store import Store
from gyrocompass.core.tables import KnownDocument
from gyrocompass.core.tables_serving import EventRow, ReviewRow, ThumbRow, VerdictRow
from gyrocompass.data.curate.build import Builder
from gyrocompass.data.curate.forget import Forgetting, carry_out, plan_to_forget
from gyrocompass.govern.retrain import mark
from gyrocompass.serve.sessions import secret_of, user_hash

FEEDBACK = "feedback"
FORGOTTEN = "user forgotten"
"""The act."""


class Traces(NamedTuple):
    """What there is of a user."""

    user: str
    """The hash."""
    events: int
    requests: tuple[str, ...]
    reviews: tuple[str, ...]
    feedback: tuple[Path, ...]
    """Folders of artifacts with their texts."""
    documents: tuple[Forgetting, ...]
    models: tuple[str, ...]
    """That learned from any of it."""


class Forgotten(NamedTuple):
    """What was done."""

    deleted: tuple[Path, ...]
    rows: int


def trace(store: Store, name: str) -> Traces:
    """What there is of a user.

    Raises:
        BadInput: nothing.
    """
    user = user_hash(secret_of(store.root).hex(), name)
    with store.database.read() as connection:
        mine = EventRow.user == user
        requests = {*connection.scalars(select(EventRow.request_id).where(mine))}
        events = int(connection.scalar(select(func.count()).select_from(EventRow).where(mine)) or 0)
        reviews = dict(
            connection.execute(select(ReviewRow.id, ReviewRow.request_id).where(ReviewRow.user == user)).all()
        )
        sources = [f"review:{review}" for review in reviews]
        ids = connection.scalars(select(KnownDocument.id).where(KnownDocument.source.in_(sources))).all()
    if not events and not reviews:
        raise BadInput(
            f"nothing here is of the user {name!r}",
            where=store.root,
            fix="give the name that requests had in `user`, or the id of their key",
        )
    documents = tuple(plan_to_forget(store, one) for one in sorted(ids))
    learned = {seen.id for one in documents for seen in one.learned if seen.learned and seen.kind == "model"}
    return Traces(
        user,
        events,
        tuple(sorted(requests | {*reviews.values()})),
        tuple(sorted(reviews)),
        tuple(folder for folder in store.folders(FEEDBACK) if _holds(folder, sources)),
        documents,
        tuple(sorted(learned)),
    )


def _holds(folder: Path, sources: Sequence[str]) -> bool:
    texts = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.jsonl"))]
    return any(f'"{source}"' in text for source in sources for text in texts)


def forget(
    builder: Builder,
    traces: Traces,
    by: str,
    reason: str = "",
    exposure_bits: Mapping[str, float] | None = None,
) -> Forgotten:
    """Take out all of it; the same again goes on where it stopped.

    Args:
        builder: with the store.
        traces: what `trace` found.
        by: who does it.
        reason: a remark for the opt-out list; it stays there, so it should not say who asked.
        exposure_bits: of their texts, by each model that learned from them, where that was measured.
    """
    store = builder.store
    deleted: list[Path] = []
    for one in traces.documents:
        # The one before may have deleted what this one was planned for.
        deleted += carry_out(builder, plan_to_forget(store, one.document_id), reason).deleted
    for folder in traces.feedback:
        if folder.is_dir():
            shutil.rmtree(folder)
            deleted.append(folder)
    mark(store, traces.models, "what a user said was forgotten", by, exposure_bits)
    with store.database.write() as connection:
        mine = ReviewRow.id.in_(traces.reviews)
        counted = select(func.count()).select_from(ReviewRow).where(mine, ReviewRow.state == "decided")
        decided = int(connection.scalar(counted) or 0)
        rows = sum(
            connection.execute(delete(table).where(where)).rowcount
            for table, where in (
                (VerdictRow, VerdictRow.review_id.in_(traces.reviews)),
                (ReviewRow, mine),
                (ThumbRow, ThumbRow.request_id.in_(traces.requests)),
                (EventRow, EventRow.user == traces.user),
            )
        )
        about = {"rows": rows, "decided": decided, "documents": len(traces.documents)}
        note(connection, by, FORGOTTEN, about | {"models": list(traces.models)})
    return Forgotten(tuple(dict.fromkeys(deleted)), rows)
