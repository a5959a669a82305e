"""The queue of answers that people decide on.

    put --> waiting --claim--> claimed --verdict--> decided
                ^                 |
                +-- lease over ---+        an item that needs two verdicts waits again after the first

Every change is one transaction of the one writer, so two people never hold the same item, and what `put`
returned is on disk. A claim is a lease: who lets it run out may still give a verdict as long as nobody else
has claimed the item. A verdict has an id that its sender makes: the same one again changes nothing.

A share of the items is looked at twice, by different people (`agreement`); where the two do not say the same
a third one decides. Who waits for an item can ask for its state, or is called at a URL (`webhooks`).
"""

from __future__ import annotations

import asyncio
import hashlib
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from pydantic import Field
from sqlalchemy import Connection, func, insert, or_, select, update

from gyrocompass.core.config import Config
from gyrocompass.core.database import Database
from gyrocompass.core.errors import BadInput
from gyrocompass.core.tables_serving import ReviewRow, VerdictRow
from gyrocompass.serve.answer import Answered, Asked, Confidence
from gyrocompass.serve.storable import storable

VerdictKind = Literal["approve", "edit", "reject", "unsafe", "prefer"]


class ReviewSettings(Config):
    """How people decide."""

    lease_s: float = Field(default=600.0, gt=0)
    """How long a claim holds without being renewed."""
    double_share: float = Field(default=0.1, ge=0, le=1)
    """Of the items that two people look at."""


class Verdict(NamedTuple):
    """What one person says of an item."""

    id: str
    """Made by the sender, unique."""
    kind: VerdictKind
    text: str | None = None
    """Of an edit: the answer as it should be."""
    preferred: int | None = None
    """Of a preference: 0 the answer, 1 the first of the others, ..."""
    reason: str = ""
    notes: str = ""


class Conflict(BadInput):
    """Somebody else was there first."""


class Status(NamedTuple):
    """What a waiting client is told."""

    id: str
    state: Literal["waiting", "claimed", "decided"]
    verdict: VerdictKind | None
    text: str | None
    """The answer that people let through; None: they let none through, or have not decided."""


class Reviews:
    """The queue.

    Args:
        database: of the store.
        settings: leases and double looks.
        now: the time, seconds since 1970.
    """

    def __init__(
        self,
        database: Database,
        settings: ReviewSettings | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._database, self.settings, self._now = database, settings or ReviewSettings(), now

    async def put(
        self,
        asked: Asked,
        answered: Answered,
        reasons: Sequence[str],
        confidence: Confidence | None,
        inclusion: float,
        *,
        urgent: bool = True,
        candidates: Sequence[str] = (),
    ) -> str:
        """Store an item; its id. It is on disk when this returns.

        Args:
            asked: the question.
            answered: the answer.
            reasons: why it is here.
            confidence: in the answer.
            inclusion: the probability with which it came here.
            urgent: whether somebody waits for it.
            candidates: other answers, to choose between.
        """
        row = _row(asked, answered, reasons, confidence, inclusion, urgent, candidates)
        row = storable(row) | {"id": uuid.uuid4().hex, "at": self._now()}
        row["needs"] = 2 if _share_of(row["id"]) < self.settings.double_share else 1

        def store() -> None:
            with self._database.write() as connection:
                connection.execute(insert(ReviewRow), [row])

        await asyncio.to_thread(store)
        return str(row["id"])

    def claim(self, by: str) -> dict[str, Any] | None:
        """The next item for a person: what they hold already, what a client waits for, then the oldest."""
        with self._database.write() as connection:
            self._give_back(connection)
            own = select(VerdictRow.review_id).where(VerdictRow.by == by)
            free = or_(ReviewRow.state == "waiting", ReviewRow.claimed_by == by)
            query = (
                select(ReviewRow.__table__)
                .where(ReviewRow.state != "decided", free, ReviewRow.id.not_in(own))
                .order_by(ReviewRow.claimed_by.is_(None), ReviewRow.urgent.desc(), ReviewRow.at, ReviewRow.id)
                .limit(1)
            )
            found = connection.execute(query).first()
            return None if found is None else self._hold(connection, dict(found._mapping), by)

    def claim_one(self, review_id: str, by: str) -> dict[str, Any]:
        """This item, for a person.

        Raises:
            Conflict: somebody else holds it, it is decided, or they have said what they think of it.
            BadInput: there is none with this id.
        """
        with self._database.write() as connection:
            self._give_back(connection)
            item = _get(connection, review_id)
            if item["state"] == "decided":
                raise Conflict("this item is decided")
            if item["claimed_by"] not in (None, by):
                raise Conflict("somebody else has this item")
            if by in [verdict["by"] for verdict in _verdicts(connection, review_id)]:
                raise Conflict("you have decided on this item; somebody else has to look at it too")
            return self._hold(connection, item, by)

    def renew(self, review_id: str, by: str) -> float:
        """Hold a claim for another lease; until when, seconds since 1970.

        Raises:
            Conflict: the claim is lost.
        """
        with self._database.write() as connection:
            item = _get(connection, review_id)
            if item["claimed_by"] != by or item["state"] != "claimed":
                raise Conflict("the claim is lost")
            return float(self._hold(connection, item, by)["lease_until"])

    def release(self, review_id: str, by: str) -> None:
        """Give an item back undecided; of no effect where the claim is lost."""
        with self._database.write() as connection:
            where = (ReviewRow.id == review_id, ReviewRow.claimed_by == by, ReviewRow.state == "claimed")
            connection.execute(update(ReviewRow).where(*where).values(_FREE))

    def decide(self, review_id: str, by: str, verdict: Verdict) -> Status:
        """Take a verdict; the same one again changes nothing.

        Raises:
            Conflict: the claim is lost to somebody else, or the item is decided.
            BadInput: there is no such item, or the verdict lacks what it needs.
        """
        with self._database.write() as connection:
            item = _get(connection, review_id)
            known = connection.execute(
                select(VerdictRow.review_id).where(VerdictRow.id == verdict.id)
            ).scalar()
            if known == review_id:
                return _status(connection, item)
            if known is not None:
                raise Conflict(f"the verdict {verdict.id} is of another item")
            _check(verdict, item)
            if item["state"] == "decided" or item["claimed_by"] != by:
                raise Conflict("the claim is lost: claim the item again")
            row = {
                "id": verdict.id,
                "review_id": review_id,
                "at": self._now(),
                "by": by,
                "verdict": verdict.kind,
                "text": verdict.text,
                "preferred": verdict.preferred,
                "reason": verdict.reason,
                "notes": verdict.notes,
            }
            connection.execute(insert(VerdictRow), [storable(row)])
            said = _verdicts(connection, review_id)
            changes: dict[str, Any] = dict(_FREE)
            if len(said) == 2 and len({(one["verdict"], one["preferred"]) for one in said}) == 2:
                changes["needs"] = max(3, item["needs"])
            if len(said) >= changes.get("needs", item["needs"]):
                changes["state"] = "decided"
                changes["webhook_due"] = self._now() if item["webhook"] else None
            connection.execute(update(ReviewRow).where(ReviewRow.id == review_id).values(changes))
            return _status(connection, item | changes)

    def status(self, review_id: str) -> Status:
        """What becomes of an item.

        Raises:
            BadInput: there is none with this id.
        """
        with self._database.read() as connection:
            return _status(connection, _get(connection, review_id))

    def item(self, review_id: str) -> dict[str, Any]:
        """An item with its verdicts, under `verdicts`.

        Raises:
            BadInput: there is none with this id.
        """
        with self._database.read() as connection:
            return _get(connection, review_id) | {"verdicts": _verdicts(connection, review_id)}

    def listed(self, state: str | None = None, most: int = 100) -> list[dict[str, Any]]:
        """Items, those that clients wait for first, then the oldest."""
        query = select(ReviewRow.__table__).order_by(ReviewRow.urgent.desc(), ReviewRow.at).limit(most)
        if state is not None:
            query = query.where(ReviewRow.state == state)
        with self._database.read() as connection:
            return [dict(row._mapping) for row in connection.execute(query)]

    def counts(self) -> dict[str, int]:
        """Items by state."""
        with self._database.read() as connection:
            query = select(ReviewRow.state, func.count()).group_by(ReviewRow.state)
            found = {str(state): int(count) for state, count in connection.execute(query)}
        return {state: found.get(state, 0) for state in ("waiting", "claimed", "decided")}

    def _give_back(self, connection: Connection) -> None:
        lost = (ReviewRow.state == "claimed", ReviewRow.lease_until < self._now())
        connection.execute(update(ReviewRow).where(*lost).values(_FREE))

    def _hold(self, connection: Connection, item: dict[str, Any], by: str) -> dict[str, Any]:
        until = self._now() + self.settings.lease_s
        held = {"state": "claimed", "claimed_by": by, "lease_until": until}
        connection.execute(update(ReviewRow).where(ReviewRow.id == item["id"]).values(held))
        return item | held


_FREE = {"state": "waiting", "claimed_by": None, "lease_until": None}


def _row(
    asked: Asked,
    answered: Answered,
    reasons: Sequence[str],
    confidence: Confidence | None,
    inclusion: float,
    urgent: bool,
    candidates: Sequence[str],
) -> dict[str, Any]:
    return {
        "request_id": asked.id,
        "state": "waiting",
        "urgent": urgent,
        "inclusion": inclusion,
        "prompt": asked.prompt,
        "messages": [dict(message) for message in asked.messages],
        "answer": answered.text,
        "tokens": [
            [token.text, token.logprob, [[text, value] for text, value in token.alternatives]]
            for token in answered.tokens
        ],
        "candidates": list(candidates),
        "reasons": list(reasons),
        "confidence": None if confidence is None else confidence.probability,
        "calibrator": "" if confidence is None else confidence.calibrator,
        "policy": "",
        "model": asked.model,
        "slice": asked.slice,
        "user": asked.user,
        "consent": asked.consent,
        "claimed_by": None,
        "lease_until": None,
        "webhook": asked.webhook if urgent else None,
        "webhook_due": None,
        "webhook_tries": 0,
    }


def _share_of(identity: str) -> float:
    """A number from 0 to 1 that an id always has."""
    return int.from_bytes(hashlib.sha256(identity.encode()).digest()[:8]) / 2**64


def _get(connection: Connection, review_id: str) -> dict[str, Any]:
    found = connection.execute(select(ReviewRow.__table__).where(ReviewRow.id == review_id)).first()
    if found is None:
        raise BadInput(f"there is no review {review_id!r}")
    return dict(found._mapping)


def _verdicts(connection: Connection, review_id: str) -> list[dict[str, Any]]:
    query = (
        select(VerdictRow.__table__)
        .where(VerdictRow.review_id == review_id)
        .order_by(VerdictRow.at, VerdictRow.id)
    )
    return [dict(row._mapping) for row in connection.execute(query)]


def _check(verdict: Verdict, item: dict[str, Any]) -> None:
    if not verdict.id or len(verdict.id) > 100:
        raise BadInput("a verdict needs an id of at most 100 characters")
    if verdict.kind == "edit" and not (verdict.text or "").strip():
        raise BadInput("an edit needs the text as it should be")
    if verdict.kind == "edit" and verdict.text == item["answer"]:
        raise BadInput("the edit is the answer itself", fix="approve it")
    if verdict.kind != "edit" and verdict.text is not None:
        raise BadInput(f"a text goes with an edit, not with {verdict.kind}")
    answers = 1 + len(item["candidates"])
    if verdict.kind == "prefer" and (verdict.preferred is None or not 0 <= verdict.preferred < answers):
        raise BadInput(f"a preference names one of {answers} answers, from 0")
    if verdict.kind == "prefer" and answers < 2:
        raise BadInput("there is only one answer: approve or reject it")


def final(item: dict[str, Any], verdicts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The verdict that counts: what most said, of equally many the last."""
    kinds = [(one["verdict"], one["preferred"]) for one in verdicts]
    return max(enumerate(verdicts), key=lambda one: (kinds.count(kinds[one[0]]), one[1]["at"], one[0]))[1]


def text_after(item: dict[str, Any], verdict: dict[str, Any]) -> str | None:
    """The answer that a verdict lets through."""
    if verdict["verdict"] == "approve":
        return str(item["answer"])
    if verdict["verdict"] == "edit":
        return str(verdict["text"])
    if verdict["verdict"] == "prefer":
        return str([item["answer"], *item["candidates"]][verdict["preferred"]])
    return None


def _status(connection: Connection, item: dict[str, Any]) -> Status:
    if item["state"] != "decided":
        return Status(item["id"], item["state"], None, None)
    verdict = final(item, _verdicts(connection, item["id"]))
    return Status(item["id"], "decided", verdict["verdict"], text_after(item, verdict))
