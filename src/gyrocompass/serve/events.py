"""The log of a server: every answer as an event in the store's database.

    record --> a queue in memory --> one thread, many events to a transaction --> the table `event`

An answer never waits for the database. What is still in the queue when the process is killed is lost, and
that is what the log may lose: what people are to decide on is stored before it is answered (`review`). A
queue that is full drops events, and counts them.

Texts are kept whole, masked by curation's own detectors, or not at all; `expire` deletes what is old.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

from pydantic import Field
from sqlalchemy import delete, insert, select

from gyrocompass.core.config import Config
from gyrocompass.core.database import Database
from gyrocompass.core.errors import GyroError
from gyrocompass.core.tables_serving import EventRow
from gyrocompass.serve.answer import Answered, Asked, Judgement
from gyrocompass.serve.storable import storable

_LOG = logging.getLogger("gyrocompass.serve")
_BATCH = 500
_PAUSE_S = 0.5
_FROM_OUTSIDE = (
    "slice", "model", "sequence_logprob", "mean_logprob", "min_logprob", "mean_entropy", "confidence",
    "reasons", "flags", "prompt", "text",
)  # fmt: skip
"""Columns that clients and models fill, with whatever they like."""


class EventSettings(Config):
    """What is kept, and for how long."""

    texts: Literal["none", "masked", "full"] = "none"
    """Of questions and answers."""
    days: float | None = Field(default=30.0, gt=0)
    """After which an event is deleted; None: never."""
    most_queued: int = Field(default=10_000, ge=1)


class EventLog:
    """Writes events behind the answers.

    Args:
        database: of the store.
        settings: what is kept.
        mask: takes out of a text what is personal or secret, for `texts: masked`.
    """

    def __init__(
        self, database: Database, settings: EventSettings, mask: Callable[[str], str] | None = None
    ) -> None:
        self._database, self._settings, self._mask = database, settings, mask
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue(settings.most_queued)
        self.dropped = 0
        self._expired_at = 0.0
        self._thread = threading.Thread(target=self._run, name="gyro-events", daemon=True)
        self._thread.start()

    def record(
        self,
        asked: Asked,
        answered: Answered | None,
        judgement: Judgement | None,
        status: int,
        sample: int = 0,
    ) -> None:
        """Queue the event of a request that ended."""
        row = event_of(asked, answered, judgement, status, sample)
        row |= {
            "prompt": self._kept(asked.prompt),
            "text": None if answered is None else self._kept(answered.text),
        }
        row |= {name: storable(row[name]) for name in _FROM_OUTSIDE}
        try:
            # Here and not in the thread, which would hold the interpreter while requests wait for it.
            self._queue.put_nowait(row)
        except queue.Full:
            self.dropped += 1

    def close(self) -> None:
        """Write what is queued, and end."""
        self._queue.put(None)
        self._thread.join()

    def _kept(self, text: str) -> str | None:
        if self._settings.texts == "none":
            return None
        return text if self._settings.texts == "full" or self._mask is None else self._mask(text)

    def _run(self) -> None:
        open_ = True
        while open_:
            rows = [self._queue.get()]
            time.sleep(0 if rows[0] is None else _PAUSE_S)
            while len(rows) < _BATCH:
                try:
                    rows.append(self._queue.get_nowait())
                except queue.Empty:
                    break
            open_ = None not in rows
            self._store([row for row in rows if row is not None])

    def _store(self, rows: list[dict[str, Any]]) -> None:
        """Try until it works: a database that goes away comes back."""
        for attempt in range(8):
            try:
                with self._database.write() as connection:
                    if rows:
                        connection.execute(insert(EventRow), rows)
                    if self._settings.days is not None and time.time() - self._expired_at > 3600:
                        expire(connection, time.time() - self._settings.days * 86400)
                        self._expired_at = time.time()
                return
            except GyroError as error:
                _LOG.warning("events wait: %s", error)
                time.sleep(min(10.0, 0.2 * 2**attempt))
        self.dropped += len(rows)
        _LOG.error("%d events are lost: the database did not come back", len(rows))


def event_of(
    asked: Asked, answered: Answered | None, judgement: Judgement | None, status: int, sample: int = 0
) -> dict[str, Any]:
    """The columns of an event, texts left out."""
    logprobs = [] if answered is None else [token.logprob for token in answered.tokens]
    known = [value for value in logprobs if value == value]
    entropies = [] if answered is None else [token.entropy for token in answered.tokens]
    told = [value for value in entropies if value is not None]
    confidence = None if judgement is None else judgement.confidence
    return {
        "id": f"{asked.id}-{sample}",
        "request_id": asked.id,
        "at": asked.received_at,
        "kind": asked.kind,
        "status": status,
        "slice": asked.slice,
        "tier": asked.tier,
        "user": asked.user,
        "model": asked.model,
        "rollout": asked.rollout,
        "arm": asked.arm,
        "engine": "" if answered is None else answered.engine,
        "prompt_tokens": 0 if answered is None else answered.prompt_tokens,
        "tokens": len(logprobs),
        "prompt_characters": len(asked.prompt),
        "sequence_logprob": sum(known) if known else None,
        "mean_logprob": sum(known) / len(known) if known else None,
        "min_logprob": min(known, default=None),
        "mean_entropy": sum(told) / len(told) if told else None,
        "confidence": None if confidence is None else confidence.probability,
        "calibrator": "" if confidence is None else confidence.calibrator,
        "policy": "" if judgement is None else judgement.policy,
        "outcome": "" if judgement is None else judgement.outcome,
        "reasons": [] if judgement is None else list(judgement.reasons),
        "flags": {} if judgement is None else dict(judgement.flags),
        "review_id": None if judgement is None else judgement.review_id,
        "inclusion": None if judgement is None else judgement.inclusion,
        "queued_s": 0.0 if answered is None else answered.queued_s,
        "first_token_s": 0.0 if answered is None else answered.first_token_s,
        "total_s": 0.0 if answered is None else answered.total_s,
        "consent": asked.consent,
    }


def expire(connection: Any, before: float) -> int:
    """Delete events from before a time, seconds since 1970; how many there were."""
    return int(connection.execute(delete(EventRow).where(EventRow.at < before)).rowcount)


def read_events(database: Database, since: float = 0.0) -> Iterator[dict[str, Any]]:
    """Events from a time on, seconds since 1970, the oldest first."""
    with database.read() as connection:
        query = select(EventRow.__table__).where(EventRow.at >= since).order_by(EventRow.at, EventRow.id)
        for row in connection.execute(query):
            yield dict(row._mapping)
