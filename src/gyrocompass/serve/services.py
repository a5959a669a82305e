"""What an app is made of, and its limits."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from fastapi import APIRouter, Request
from pydantic import Field

from gyrocompass.core.config import Config
from gyrocompass.serve.answer import EventSink, Gatekeeper
from gyrocompass.serve.backend import Backend
from gyrocompass.serve.decisions import Calibrate
from gyrocompass.serve.keys import Caller, Keys

NOBODY = Caller("", "", "", ())


class ServeSettings(Config):
    """Limits of a server."""

    max_body_bytes: int = Field(default=4 * 2**20, ge=1024)
    max_tokens: int = Field(default=4096, ge=1)
    """Of one answer, whatever a request asks for."""
    deadline_s: float | None = Field(default=None, gt=0)
    """Of a request that names none, and the most that one may name."""
    user_secret: str = Field(default="", repr=False)
    """Keys the hash by which events know users; empty: one of this process's own."""


class Lane(NamedTuple):
    """What answers a request, from its tokenizer to its policy: one whole, which moves as one."""

    backend: Backend
    stronger: Backend | None = None
    gate: Gatekeeper | None = None
    moderate: Callable[[str], Awaitable[Mapping[str, float]]] | None = None
    """Safety scores of a text, by name, 0 to 1."""
    calibrate_choice: Calibrate | None = None
    lineage: Mapping[str, str | None] = {}
    """Ids of what answers: model, dataset, recipe."""
    close: Callable[[], Awaitable[None]] | None = None
    """What else it holds."""

    def told(self) -> dict[str, Any]:
        """Its lineage, as answers say it."""
        return {"lineage": dict(self.lineage)} if self.lineage else {}


async def close_lane(lane: Lane) -> None:
    """Let go of what a lane holds."""
    await lane.backend.close()
    if lane.stronger is not None:
        await lane.stronger.close()
    if lane.close is not None:
        await lane.close()


class Way(NamedTuple):
    """Where a user's request goes."""

    lane: Lane
    rollout: str = ""
    """The trial that it is a part of; empty: none."""
    arm: str = ""
    shadow: Lane | None = None
    """Answers too, and is not shown."""


class Ways(Protocol):
    """Which lane a user gets. A request keeps the one that it began with."""

    def of(self, user: str) -> Way:
        """For a user, a keyed hash; "" is somebody who is not known."""

    async def close(self) -> None:
        """Close all lanes."""


class OneWay:
    """The same lane for everybody, always."""

    def __init__(self, lane: Lane) -> None:
        self._way = Way(lane)

    def of(self, user: str) -> Way:
        """See `Ways`."""
        return self._way

    async def close(self) -> None:
        """See `Ways`."""
        await close_lane(self._way.lane)


class Services(NamedTuple):
    """What an app is made of."""

    ways: Ways
    events: EventSink | None = None
    keys: Keys | None = None
    """None: everybody may ask."""
    routers: Sequence[APIRouter] = ()
    """More routes: review, pages."""
    on_close: Sequence[Callable[[], Awaitable[None]]] = ()
    background: Sequence[Callable[[], Coroutine[Any, Any, None]]] = ()
    """What runs as long as the server does."""

    @property
    def champion(self) -> Lane:
        """What answers those who are not known."""
        return self.ways.of("").lane

    async def caller(self, request: Request) -> Caller:
        """Who asks, if a key of theirs lets them."""
        if self.keys is None:
            return NOBODY
        return await self.keys.admit(request.headers.get("authorization"), "infer")
