"""The tables of a server: what was asked, what people look at, who may ask, and what administrators did.

    event                       one answer, as it ended
    thumb                       what its user said of it
    review --< verdict          one answer that people decide on, and what each of them said
    api_key                     who may ask
    admin_act                   what administrators did, each act hashed with the one before it

They are in the store's database, so that lineage and feedback find the models that answered.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, ForeignKey, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from gyrocompass.core.tables import Table

__all__ = ["AdminAct", "ApiKeyRow", "EventRow", "ReviewRow", "Table", "ThumbRow", "VerdictRow"]


class EventRow(Table):
    """One answer, or a request that got none."""

    __tablename__ = "event"

    id: Mapped[str] = mapped_column(primary_key=True)
    request_id: Mapped[str] = mapped_column(index=True)
    at: Mapped[float] = mapped_column(index=True)
    """When it arrived, seconds since 1970."""
    kind: Mapped[str]
    status: Mapped[int]
    slice: Mapped[str]
    tier: Mapped[str]
    user: Mapped[str]
    """A keyed hash."""
    model: Mapped[str]
    rollout: Mapped[str] = mapped_column(index=True)
    """During which it was; empty: none."""
    arm: Mapped[str]
    """champion, challenger or shadow, of a user who takes part; else empty."""
    engine: Mapped[str]
    prompt_tokens: Mapped[int]
    tokens: Mapped[int]
    prompt_characters: Mapped[int]
    sequence_logprob: Mapped[float | None]
    mean_logprob: Mapped[float | None]
    min_logprob: Mapped[float | None]
    mean_entropy: Mapped[float | None]
    confidence: Mapped[float | None]
    calibrator: Mapped[str]
    policy: Mapped[str]
    outcome: Mapped[str]
    reasons: Mapped[list[str]] = mapped_column(JSON)
    flags: Mapped[dict[str, float]] = mapped_column(JSON)
    review_id: Mapped[str | None]
    inclusion: Mapped[float | None]
    """The probability with which it was drawn for review; null: it could not be."""
    queued_s: Mapped[float]
    first_token_s: Mapped[float]
    total_s: Mapped[float]
    consent: Mapped[bool]
    prompt: Mapped[str | None]
    """Null where texts are not kept."""
    text: Mapped[str | None]


class ThumbRow(Table):
    """Whether a user liked an answer."""

    __tablename__ = "thumb"

    request_id: Mapped[str] = mapped_column(primary_key=True)
    at: Mapped[float]
    up: Mapped[bool]


class ReviewRow(Table):
    """An answer that people decide on."""

    __tablename__ = "review"

    id: Mapped[str] = mapped_column(primary_key=True)
    request_id: Mapped[str] = mapped_column(index=True)
    at: Mapped[float]
    state: Mapped[str] = mapped_column(index=True)
    """waiting, claimed or decided."""
    urgent: Mapped[bool]
    """Whether a client waits for it; else it was drawn for an audit."""
    inclusion: Mapped[float]
    prompt: Mapped[str]
    messages: Mapped[list[dict[str, Any]]] = mapped_column(JSON)
    answer: Mapped[str]
    tokens: Mapped[list[Any]] = mapped_column(JSON)
    """[text, log p, [[other text, log p], ...]] of each."""
    candidates: Mapped[list[str]] = mapped_column(JSON)
    """Other answers to the same question."""
    reasons: Mapped[list[str]] = mapped_column(JSON)
    confidence: Mapped[float | None]
    calibrator: Mapped[str]
    policy: Mapped[str]
    model: Mapped[str]
    slice: Mapped[str]
    user: Mapped[str]
    consent: Mapped[bool]
    needs: Mapped[int]
    """Verdicts, by different people."""
    claimed_by: Mapped[str | None]
    lease_until: Mapped[float | None]
    webhook: Mapped[str | None]
    webhook_due: Mapped[float | None]
    """When to call it next; null: never, or no more."""
    webhook_tries: Mapped[int]


class VerdictRow(Table):
    """What one person said of an item."""

    __tablename__ = "verdict"
    __table_args__ = (UniqueConstraint("review_id", "by"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    """Given by who sends it: the same one again changes nothing."""
    review_id: Mapped[str] = mapped_column(ForeignKey("review.id"), index=True)
    at: Mapped[float] = mapped_column(index=True)
    by: Mapped[str]
    verdict: Mapped[str]
    """approve, edit, reject, unsafe or prefer."""
    text: Mapped[str | None]
    """Of an edit."""
    preferred: Mapped[int | None]
    """Of a preference: 0 the answer, 1 the first candidate, ..."""
    reason: Mapped[str]
    notes: Mapped[str]


class ApiKeyRow(Table):
    """Who may ask. The key itself is not here."""

    __tablename__ = "api_key"

    id: Mapped[str] = mapped_column(primary_key=True)
    """The beginning of the key, by which it is found."""
    hash: Mapped[str]
    """Of the rest, by argon2."""
    name: Mapped[str]
    scopes: Mapped[list[str]] = mapped_column(JSON)
    tier: Mapped[str]
    requests_per_minute: Mapped[float | None]
    created_at: Mapped[float]
    revoked_at: Mapped[float | None]


class AdminAct(Table):
    """Something an administrator did; never changed, never removed."""

    __tablename__ = "admin_act"

    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    at: Mapped[float]
    by: Mapped[str]
    act: Mapped[str]
    about: Mapped[dict[str, Any]] = mapped_column(JSON)
    hash: Mapped[str]
    """SHA-256 of the hash before it and of this row."""
