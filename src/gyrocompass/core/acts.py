"""What administrators did, in a chain: each act carries a hash of itself and of the act before it.

    hash_n = SHA-256(hash_(n-1) | number, at, by, act, about as canonical JSON)

So an act that is changed or taken out later breaks the chain, and `check_chain` names the place.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, insert, select

from gyrocompass.core.config import canonical_json
from gyrocompass.core.database import Database
from gyrocompass.core.tables_serving import AdminAct


def note(connection: Connection, by: str, act: str, about: Mapping[str, Any]) -> None:
    """Write down an act, in the transaction that does it."""
    last = connection.execute(
        select(AdminAct.number, AdminAct.hash).order_by(AdminAct.number.desc()).limit(1)
    ).first()
    number, before = (0, "") if last is None else (int(last[0]) + 1, str(last[1]))
    row = {"number": number, "at": time.time(), "by": by, "act": act, "about": dict(about)}
    connection.execute(insert(AdminAct), [row | {"hash": _hash(before, row)}])


def acts(database: Database) -> list[dict[str, Any]]:
    """All acts, the oldest first."""
    with database.read() as connection:
        rows = connection.execute(select(AdminAct.__table__).order_by(AdminAct.number))
        return [dict(row._mapping) for row in rows]


def check_chain(database: Database) -> int | None:
    """The number of the first act that does not follow from those before it; None: all do."""
    before = ""
    for place, row in enumerate(acts(database)):
        given = row.pop("hash")
        if row["number"] != place or given != _hash(before, row):
            return place
        before = given
    return None


def _hash(before: str, row: Mapping[str, Any]) -> str:
    return hashlib.sha256(f"{before}|{canonical_json(dict(row))}".encode()).hexdigest()
