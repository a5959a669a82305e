from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import update

from gyrocompass.core.acts import acts, check_chain
from gyrocompass.core.database import Database
from gyrocompass.core.errors import BadInput
from gyrocompass.core.tables_serving import AdminAct
from gyrocompass.serve.failures import Failure
from gyrocompass.serve.keys import Caller, Keys, create_key, list_keys, revoke_key
from gyrocompass.serve.sessions import Sessions, secret_of


def refused(keys: Keys, header: str | None, scope: str = "infer") -> int:
    with pytest.raises(Failure) as raised:
        keys.check(header, scope)
    return raised.value.status


def test_a_key_opens_what_it_says_until_it_is_revoked(database: Database) -> None:
    now = [0.0]
    key = create_key(database, "app", ["infer"], tier="gold")
    keys = Keys(database, lambda: now[0])
    caller = keys.check(f"Bearer {key}", "infer")
    assert (caller.name, caller.tier, caller.scopes) == ("app", "gold", ("infer",))
    assert refused(keys, f"Bearer {key}", "review") == 403
    for wrong in (
        None,
        "",
        "Bearer x",
        f"Bearer {key}x",
        f"Bearer {key[:-1]}",
        "Bearer gyro__",
        "Bearer gyro_a_é",
    ):
        assert refused(keys, wrong) == 401
    (listed,) = list_keys(database)
    assert listed["id"] == caller.id and "hash" not in listed
    assert key.split("_", 2)[2] not in str(listed)
    revoke_key(database, caller.id)
    now[0] = 61
    assert refused(keys, f"Bearer {key}") == 401
    with pytest.raises(BadInput, match="no key"):
        revoke_key(database, caller.id)
    with pytest.raises(BadInput, match="no such scope: write"):
        create_key(database, "x", ["write"])
    everything = create_key(database, "root", ["admin"])
    assert keys.check(f"Bearer {everything}", "review").name == "root"


def test_hashing_a_key_holds_nobody_up(database: Database) -> None:
    key = create_key(database, "app", ["infer"])
    keys = Keys(database)

    async def ask() -> tuple[list[str], int]:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.001)
                ticks += 1

        ticking = asyncio.ensure_future(tick())
        found = [(await keys.admit(f"Bearer {key}", "infer")).name for _ in range(2)]
        for _ in range(3):
            with pytest.raises(Failure):
                await keys.admit("Bearer gyro_no_no", "infer")
        ticking.cancel()
        return found, ticks

    names, ticks = asyncio.run(ask())
    assert names == ["app", "app"] and ticks >= 3


def test_a_rate_is_kept(database: Database) -> None:
    now = [0.0]
    key = create_key(database, "slow", ["infer"], requests_per_minute=6)
    keys = Keys(database, lambda: now[0])
    for _ in range(6):
        keys.check(f"Bearer {key}", "infer")
    with pytest.raises(Failure) as raised:
        keys.check(f"Bearer {key}", "infer")
    assert raised.value.status == 429 and raised.value.retry_after_s == pytest.approx(10)
    now[0] += 10
    keys.check(f"Bearer {key}", "infer")
    assert refused(keys, f"Bearer {key}") == 429


def test_what_administrators_did_cannot_be_changed_unseen(database: Database) -> None:
    for name in "abcd":
        create_key(database, name, ["infer"])
    assert [act["about"]["name"] for act in acts(database)] == list("abcd")
    assert check_chain(database) is None
    with database.write() as connection:
        connection.execute(update(AdminAct).where(AdminAct.number == 2).values(by="nobody"))
    assert check_chain(database) == 2


SESSIONS = Sessions(b"secret")
COOKIE = SESSIONS.begin(Caller("1", "ann", "", ("review",)))


def test_a_session_is_what_its_key_was() -> None:
    session = SESSIONS.read(COOKIE)
    assert session is not None and session.may("review") and not session.may("admin")
    assert session.by == "ann (1)"
    token = SESSIONS.token(session)
    assert SESSIONS.is_token(session, token)
    assert not SESSIONS.is_token(session, None) and not SESSIONS.is_token(session, token[:-1])
    other = SESSIONS.read(SESSIONS.begin(Caller("1", "ann", "", ("review",))))
    assert other is not None and not SESSIONS.is_token(other, token)
    assert Sessions(b"other").read(COOKIE) is None
    assert Sessions(b"secret", lambda: 1e12).read(COOKIE) is None


@given(st.integers(0, len(COOKIE) - 1), st.characters(codec="latin-1"))
def test_no_changed_cookie_is_taken(place: int, letter: str) -> None:
    changed = COOKIE[:place] + letter + COOKIE[place + 1 :]
    assert changed == COOKIE or SESSIONS.read(changed) is None


def test_the_secret_stays_and_is_one_s_own(tmp_path: Path) -> None:
    secret = secret_of(tmp_path)
    assert secret == secret_of(tmp_path) and len(secret) == 32
    assert (tmp_path / "serve.secret").stat().st_mode & 0o777 == 0o600
