"""Calls to those who wait for people: what was decided is posted to the URL that a request named.

    decided, due --> POST {"id", "state", "verdict", "text"}, signed --> done, or due again later

That a call is due is stored with the decision itself, so no crash loses one; a call that was made right
before a crash may be made again, and carries the same id. A failed one is tried again after 1, 2, 4, ... s,
up to an hour, for a day. The signature is HMAC-SHA256 of the body by the server's secret, in the header
X-Gyro-Signature, as `sha256=<hex>`.

Only https URLs and this machine are called, and redirects are not followed.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import json
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

from sqlalchemy import select, update

from gyrocompass.core.database import Database
from gyrocompass.core.errors import GyroError
from gyrocompass.core.tables_serving import ReviewRow

_LOG = logging.getLogger("gyrocompass.serve")
_LONGEST_WAIT_S = 3600.0
_MOST_TRIES = 36
"""A day of them."""

Post = Callable[[str, bytes, dict[str, str]], Awaitable[int]]
"""URL, body and headers to the status."""


def may_be_called(url: str) -> bool:
    """Whether a URL is https, or of this machine.

    >>> may_be_called("https://example.com/hook"), may_be_called("http://127.0.0.1:9/x")
    (True, True)
    >>> may_be_called("http://example.com/"), may_be_called("file:///etc/passwd"), may_be_called("https://")
    (False, False, False)
    """
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        _ = parts.port
    except ValueError:
        return False
    if parts.username or parts.password or not host:
        return False
    if parts.scheme == "https":
        return not _is_private(host)
    return parts.scheme == "http" and host in ("127.0.0.1", "::1", "localhost")


def _is_private(host: str) -> bool:
    """Whether a host is an address that only a server's own network has."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_link_local or address.is_multicast or address.is_unspecified


class Webhooks:
    """Makes the calls that are due, until it is cancelled.

    Args:
        database: with the reviews.
        status: what is told of a review.
        secret: signs.
        post: sends; None: by httpx.
        now: the time, seconds since 1970.
    """

    def __init__(
        self,
        database: Database,
        status: Callable[[str], Any],
        secret: bytes,
        post: Post | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._database, self._status, self._secret = database, status, secret
        self._post, self._now = post or _by_httpx, now

    async def run(self, pause_s: float = 1.0) -> None:
        """Look for what is due, again and again."""
        while True:
            try:
                await self.call_all()
            except GyroError as error:
                _LOG.warning("webhooks wait: %s", error)
            await asyncio.sleep(pause_s)

    async def call_all(self) -> int:
        """Call what is due now; how many were reached."""
        due = await asyncio.to_thread(self._due)
        reached = await asyncio.gather(*(self._call(*one) for one in due))
        return sum(reached)

    def _due(self) -> list[tuple[str, str, int]]:
        with self._database.read() as connection:
            query = select(ReviewRow.id, ReviewRow.webhook, ReviewRow.webhook_tries).where(
                ReviewRow.webhook_due <= self._now(), ReviewRow.webhook.is_not(None)
            )
            return [(row[0], str(row[1]), row[2]) for row in connection.execute(query.limit(100))]

    async def _call(self, review_id: str, url: str, tries: int) -> bool:
        body = json.dumps((await asyncio.to_thread(self._status, review_id))._asdict()).encode()
        signature = hmac.new(self._secret, body, hashlib.sha256).hexdigest()
        headers = {"Content-Type": "application/json", "X-Gyro-Signature": f"sha256={signature}"}
        try:
            status = await self._post(url, body, headers)
        except Exception as error:  # whatever it is, the call is made again
            _LOG.info("webhook %s: %s", review_id, error)
            status = 0
        reached = 200 <= status < 300
        again = None
        if not reached and tries + 1 < _MOST_TRIES:
            again = self._now() + min(_LONGEST_WAIT_S, 2.0**tries)
        changes = {"webhook_due": again, "webhook_tries": tries + 1}
        await asyncio.to_thread(self._note, review_id, changes)
        return reached

    def _note(self, review_id: str, changes: dict[str, Any]) -> None:
        with self._database.write() as connection:
            connection.execute(update(ReviewRow).where(ReviewRow.id == review_id).values(changes))


async def _by_httpx(url: str, body: bytes, headers: dict[str, str]) -> int:
    import httpx

    async with httpx.AsyncClient(timeout=10, follow_redirects=False) as client:
        return (await client.post(url, content=body, headers=headers)).status_code
