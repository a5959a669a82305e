"""Sessions of people at the pages: a signed cookie, and a token that forms carry against forged requests.

    cookie = payload . HMAC-SHA256(secret, payload)          payload: key id, scopes, end, nonce
    token  = HMAC-SHA256(secret, "csrf" | nonce)

A session begins with an API key and holds no more than it. The secret is a file of the store that only its
owner can read; without it no cookie can be made.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from gyrocompass.serve.keys import Caller

COOKIE = "gyro_session"
_LIFE_S = 12 * 3600.0


def user_hash(secret: str, user: str) -> str:
    """How a user is known in the database: HMAC-SHA256 of the name under the server's secret."""
    return hmac.new(secret.encode(), user.encode(), hashlib.sha256).hexdigest()[:32]


class Session(NamedTuple):
    """Who sits at the page."""

    by: str
    """What verdicts are signed with."""
    scopes: tuple[str, ...]
    until: float
    nonce: str

    def may(self, scope: str) -> bool:
        """Whether they may do this."""
        return scope in self.scopes or "admin" in self.scopes


class Sessions:
    """Makes cookies and reads them.

    Args:
        secret: of this server.
        now: the time, seconds since 1970.
    """

    def __init__(self, secret: bytes, now: Callable[[], float] = time.time) -> None:
        self._secret, self._now = secret, now

    def begin(self, caller: Caller) -> str:
        """A cookie's value."""
        session = {
            "by": f"{caller.name} ({caller.id})",
            "scopes": list(caller.scopes),
            "until": self._now() + _LIFE_S,
            "nonce": secrets.token_hex(16),
        }
        payload = base64.urlsafe_b64encode(json.dumps(session).encode()).decode()
        return f"{payload}.{self._sign(payload)}"

    def read(self, cookie: str | None) -> Session | None:
        """The session of a cookie; None where it is not one of ours, or is over."""
        payload, _, signature = (cookie or "").rpartition(".")
        if not payload or not hmac.compare_digest(signature.encode(), self._sign(payload).encode()):
            return None
        found = json.loads(base64.urlsafe_b64decode(payload))
        session = Session(found["by"], tuple(found["scopes"]), found["until"], found["nonce"])
        return session if session.until > self._now() else None

    def token(self, session: Session) -> str:
        """What forms of this session carry."""
        return self._sign(f"csrf|{session.nonce}")

    def is_token(self, session: Session, token: str | None) -> bool:
        """Whether a form is of this session."""
        return hmac.compare_digest((token or "").encode(), self.token(session).encode())

    def _sign(self, text: str) -> str:
        return hmac.new(self._secret, text.encode(), hashlib.sha256).hexdigest()


def secret_of(folder: Path) -> bytes:
    """The secret in a store's folder, made on first use, readable by its owner alone."""
    path = folder / "serve.secret"
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return path.read_bytes()
    with os.fdopen(descriptor, "wb") as file:
        secret = secrets.token_bytes(32)
        file.write(secret)
    return secret
