"""The tables of the registry: named things in versions, and aliases that point at one of them."""

from __future__ import annotations

from sqlalchemy import ForeignKeyConstraint
from sqlalchemy.orm import Mapped, mapped_column

from gyrocompass.core.tables_serving import Table

__all__ = ["AliasRow", "Table", "VersionRow"]


class VersionRow(Table):
    """One version of a name: an artifact."""

    __tablename__ = "registered"

    name: Mapped[str] = mapped_column(primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    artifact_id: Mapped[str] = mapped_column(index=True)
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
