"""API keys: made once, shown once, kept as a hash; who they are of, what they may, how often.

    gyro_<12 characters: the id>_<43 characters: the secret>

The secret is hashed with argon2id. Checking it costs tens of milliseconds, so a key that was right is
remembered in memory by its SHA-256 for a minute, in which a revoked key still works. A rate is a bucket of
tokens: a minute's worth at once, filled evenly.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import threading
import time
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerifyMismatchError
from sqlalchemy import insert, select, update

from gyrocompass.core.acts import note
from gyrocompass.core.database import Database
from gyrocompass.core.errors import BadInput
from gyrocompass.core.tables_serving import ApiKeyRow
from gyrocompass.serve.failures import Failure

SCOPES = ("infer", "review", "admin")
"""Ask the model; decide on answers; everything."""
_REMEMBERED_S = 60.0
_MOST_REMEMBERED = 10_000
_HASHER = PasswordHasher()
_NO_HASH = _HASHER.hash("no key has this")
"""Checked where there is no such key, so that it takes as long as where there is one."""


class Caller(NamedTuple):
    """Who asks."""

    id: str
    name: str
    tier: str
    scopes: tuple[str, ...]


class _Known(NamedTuple):
    caller: Caller
    requests_per_minute: float | None
    until: float


def create_key(
    database: Database,
    name: str,
    scopes: Collection[str],
    *,
    tier: str = "",
    requests_per_minute: float | None = None,
    by: str = "command line",
) -> str:
    """Make a key; it is returned, and nowhere else to be found again.

    Raises:
        BadInput: a scope that there is not, or none.
    """
    wrong = [scope for scope in scopes if scope not in SCOPES]
    if wrong or not scopes:
        raise BadInput(
            f"no such scope: {', '.join(wrong) or 'none given'}", fix=f"choose of {', '.join(SCOPES)}"
        )
    identity, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
    with database.write() as connection:
        row = {
            "id": identity,
            "hash": _HASHER.hash(secret),
            "name": name,
            "scopes": sorted(set(scopes)),
            "tier": tier,
            "requests_per_minute": requests_per_minute,
            "created_at": time.time(),
            "revoked_at": None,
        }
        connection.execute(insert(ApiKeyRow), [row])
        note(connection, by, "key created", {"key": identity, "name": name, "scopes": row["scopes"]})
    return f"gyro_{identity}_{secret}"


def revoke_key(database: Database, identity: str, *, by: str = "command line") -> None:
    """Make a key useless, from a minute on at the latest.

    Raises:
        BadInput: there is no such key, or it is revoked already.
    """
    with database.write() as connection:
        where = (ApiKeyRow.id == identity, ApiKeyRow.revoked_at.is_(None))
        changed = connection.execute(update(ApiKeyRow).where(*where).values(revoked_at=time.time()))
        if not changed.rowcount:
            raise BadInput(f"there is no key {identity!r} that works", fix="gyro keys list")
        note(connection, by, "key revoked", {"key": identity})


def list_keys(database: Database) -> list[dict[str, Any]]:
    """All keys, without their hashes, the oldest first."""
    with database.read() as connection:
        rows = connection.execute(select(ApiKeyRow.__table__).order_by(ApiKeyRow.created_at))
        return [{name: value for name, value in row._mapping.items() if name != "hash"} for row in rows]


class Keys:
    """Checks the keys of requests.

    Args:
        database: of the store.
        clock: seconds that only go forward.
    """

    def __init__(self, database: Database, clock: Callable[[], float] = time.monotonic) -> None:
        self._database, self._clock = database, clock
        self._known: dict[bytes, _Known] = {}
        self._buckets: dict[str, tuple[float, float]] = {}
        self._lock = threading.Lock()

    def check(self, authorization: str | None, scope: str) -> Caller:
        """The caller of a request with this header, one of whose requests this is.

        Raises:
            Failure: 401 without a key that works, 403 for one without the scope, 429 beyond its rate.
        """
        known = self._of(_key_of(authorization))
        if scope not in known.caller.scopes and "admin" not in known.caller.scopes:
            raise Failure(403, f"this key may not do this: it lacks the scope {scope}", code="no_scope")
        self._take(known)
        return known.caller

    async def admit(self, authorization: str | None, scope: str) -> Caller:
        """As `check`, off the loop where the key has to be hashed.

        Raises:
            Failure: as for `check`.
        """
        known = self._known.get(_digest(_key_of(authorization)))
        if known is not None and known.until >= self._clock():
            return self.check(authorization, scope)
        return await asyncio.to_thread(self.check, authorization, scope)

    def caller(self, key: str) -> Caller:
        """Who a key is of.

        Raises:
            Failure: 401 for one that does not work.
        """
        return self._of(key).caller

    def _of(self, key: str) -> _Known:
        digest = _digest(key)
        known = self._known.get(digest)
        if known is None or known.until < self._clock():
            known = self._read(key)
            with self._lock:
                if len(self._known) >= _MOST_REMEMBERED:
                    self._known.clear()
                self._known[digest] = known
        return known

    def _read(self, key: str) -> _Known:
        parts = key.split("_", 2)
        identity, secret = (parts[1], parts[2]) if len(parts) == 3 and parts[0] == "gyro" else ("", "")
        with self._database.read() as connection:
            query = select(ApiKeyRow.__table__).where(ApiKeyRow.id == identity)
            found = connection.execute(query).first()
        row: dict[str, Any] = {} if found is None else dict(found._mapping)
        if not _is_right(row.get("hash", _NO_HASH), secret) or not row or row["revoked_at"] is not None:
            raise Failure(401, "no key, or one that does not work: send Authorization: Bearer gyro_...")
        caller = Caller(row["id"], row["name"], row["tier"], tuple(row["scopes"]))
        return _Known(caller, row["requests_per_minute"], self._clock() + _REMEMBERED_S)

    def _take(self, known: _Known) -> None:
        most = known.requests_per_minute
        if most is None:
            return
        with self._lock:
            now = self._clock()
            left, at = self._buckets.get(known.caller.id, (most, now))
            left = min(most, left + (now - at) * most / 60)
            if left < 1:
                self._buckets[known.caller.id] = (left, now)
                wait = (1 - left) * 60 / most
                raise Failure(
                    429, f"more than {most:g} requests a minute", code="rate_limit", retry_after_s=wait
                )
            self._buckets[known.caller.id] = (left - 1, now)


def _key_of(authorization: str | None) -> str:
    return (authorization or "").removeprefix("Bearer ").strip()


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _is_right(hashed: str, secret: str) -> bool:
    try:
        return bool(_HASHER.verify(hashed, secret))
    except (VerifyMismatchError, InvalidHashError):
        return False
