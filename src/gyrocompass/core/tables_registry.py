"""The tables of the registry: named things in versions, aliases that point at one of them, and rollouts.

registered --< alias        champion, challenger, shadow, ...
           --< rollout      a version that is tried on users, and what came of it
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, ForeignKeyConstraint
from sqlalchemy.orm import Mapped, mapped_column

from gyrocompass.core.tables_serving import Table

__all__ = ["AliasRow", "RolloutRow", "Table", "VersionRow"]


class VersionRow(Table):
    """One version of a name: an artifact, and of a model the policy that it is served behind."""

    __tablename__ = "registered"

    name: Mapped[str] = mapped_column(primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    artifact_id: Mapped[str] = mapped_column(index=True)
    policy_id: Mapped[str | None]
    """The artifact of its policy, which names the calibrator."""
    at: Mapped[float]
    by: Mapped[str]


class AliasRow(Table):
    """Which version an alias means now; what it meant before stands in the acts."""

    __tablename__ = "alias"
    __table_args__ = (ForeignKeyConstraint(["name", "version"], ["registered.name", "registered.version"]),)

    name: Mapped[str] = mapped_column(primary_key=True)
    alias: Mapped[str] = mapped_column(primary_key=True)
    version: Mapped[int]
    decision_id: Mapped[str | None]
    """The artifact of the decision that put it there; null: nobody had to decide."""


class RolloutRow(Table):
    """One trial of a version on users."""

    __tablename__ = "rollout"
    __table_args__ = (ForeignKeyConstraint(["name", "version"], ["registered.name", "registered.version"]),)

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(index=True)
    version: Mapped[int]
    champion: Mapped[int]
    """The version that it is compared with."""
    plan: Mapped[dict[str, Any]] = mapped_column(JSON)
    state: Mapped[str]
    """running, kept, rolled back, undecided or stopped."""
    why: Mapped[str]
    found: Mapped[list[dict[str, Any]]] = mapped_column(JSON)
    """What was known of each guardrail when it ended."""
    at: Mapped[float]
    by: Mapped[str]
    ended_at: Mapped[float | None]
