"""What is around every request: its id, its size, its time, and an error's shape when all else failed.

A plain ASGI layer: it reads no body and buffers nothing, so streams pass through it untouched. Questions to
the model go from here to their handlers: what a framework does around each costs as much as a gate.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from gyrocompass.serve.failures import Failure
from gyrocompass.serve.metrics import Metrics

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Handler = Callable[[Request], Awaitable[Response]]

_LOG = logging.getLogger("gyrocompass.serve")
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,100}")
_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
]


class _Ids:
    """32 hexadecimal digits that nobody can guess; the system is asked for many at a time."""

    def __init__(self) -> None:
        self._drawn, self._place = "", 0

    def new(self) -> str:
        """Another one."""
        if self._place >= len(self._drawn):
            self._drawn, self._place = secrets.token_hex(16 * 256), 0
        self._place += 32
        return self._drawn[self._place - 32 : self._place]


class Surface:
    """Wraps an app.

    Args:
        app: what answers.
        metrics: counts what ends.
        max_body_bytes: of a request; a longer one gets 413 as soon as that is known.
        direct: handlers of POST requests by path, which are asked instead of the app.
    """

    def __init__(
        self, app: Any, *, metrics: Metrics, max_body_bytes: int, direct: Mapping[str, Handler]
    ) -> None:
        self._app, self._metrics, self._max_body_bytes = app, metrics, max_body_bytes
        self._direct, self._ids = direct, _Ids()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, started, route = time.perf_counter(), 500, False, ""
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        scope["gyro_id"] = self._ids.new()
        shown_id = given if _REQUEST_ID.fullmatch(given) else scope["gyro_id"].encode()
        taken = 0

        async def counted() -> MutableMapping[str, Any]:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self._max_body_bytes:
                raise self._too_large()
            return message

        async def sent(message: MutableMapping[str, Any]) -> None:
            nonlocal status, started
            if message["type"] == "http.response.start":
                status, started = message["status"], True
                message["headers"] = [*message.get("headers", []), (b"x-request-id", shown_id), *_HEADERS]
            await send(message)

        try:
            length = headers.get(b"content-length", b"0")
            if length.isdigit() and int(length) > self._max_body_bytes:
                raise self._too_large()
            handler = self._direct.get(scope["path"]) if scope["method"] == "POST" else None
            if handler is None:
                await self._app(scope, counted, sent)
            else:
                route = scope["path"]
                response = await handler(Request(scope, counted))
                await response(scope, counted, sent)
        except Failure as failure:
            if started:
                raise
            await respond(failure, sent)
        except Exception:
            _LOG.exception("request %s failed", scope["gyro_id"])
            if started:
                raise
            await respond(Failure(500, f"an error of ours; the log has it under {scope['gyro_id']}"), sent)
        finally:
            route = route or getattr(scope.get("route"), "path", "other")
            took_s = time.perf_counter() - began
            asyncio.get_running_loop().call_soon(self._metrics.request, route, status, took_s)

    def _too_large(self) -> Failure:
        return Failure(413, f"the request is larger than {self._max_body_bytes:,} bytes", code="too_large")


async def respond(failure: Failure, send: Send) -> None:
    """Send an error."""
    body = json.dumps(failure.body()).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **failure.headers()}
    pairs = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": failure.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
