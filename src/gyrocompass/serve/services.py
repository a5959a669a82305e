"""What an app is made of, and its limits."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, NamedTuple

from fastapi import APIRouter
from pydantic import Field

from gyrocompass.core.config import Config
from gyrocompass.serve.answer import EventSink, Gatekeeper
from gyrocompass.serve.backend import Backend
from gyrocompass.serve.decisions import Calibrate
from gyrocompass.serve.keys import Keys


class ServeSettings(Config):
    """Limits of a server."""

    max_body_bytes: int = Field(default=4 * 2**20, ge=1024)
    max_tokens: int = Field(default=4096, ge=1)
    """Of one answer, whatever a request asks for."""
    deadline_s: float | None = Field(default=None, gt=0)
    """Of a request that names none, and the most that one may name."""
    user_secret: str = Field(default="", repr=False)
    """Keys the hash by which events know users; empty: one of this process's own."""


class Services(NamedTuple):
    """What an app is made of."""

    backend: Backend
    stronger: Backend | None = None
    gate: Gatekeeper | None = None
    events: EventSink | None = None
    keys: Keys | None = None
    """None: everybody may ask."""
    moderate: Callable[[str], Awaitable[Mapping[str, float]]] | None = None
    """Safety scores of a text, by name, 0 to 1."""
    calibrate_choice: Calibrate | None = None
    lineage: Mapping[str, str | None] = {}
    """Ids of what answers: model, dataset, recipe."""
    routers: Sequence[APIRouter] = ()
    """More routes: review, pages."""
    on_close: Sequence[Callable[[], Awaitable[None]]] = ()
    background: Sequence[Callable[[], Coroutine[Any, Any, None]]] = ()
    """What runs as long as the server does."""
