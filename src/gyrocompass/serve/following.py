"""Lanes that follow a registry: which version answers changes while the server runs, and no request notices.

    look() --> Wanted: the champion, the one before it, and a version on trial
    not open yet --open_lane, beside the running ones--> then all new requests go there
    no longer wanted --> closed, when it has nothing left to do

A request keeps the lane that it began with: model, tokenizer, calibrator and policy are one. The champion
before stays open, so the way back is a matter of one look; so does what was on trial, for as long as it has
work. What cannot be opened is said once, and the lanes stay as they are.

What the registry is, this module does not know: `look` and `open_lane` are given.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import NamedTuple

from gyrocompass.core.errors import GyroError
from gyrocompass.serve.services import Lane, Way, close_lane

_LOG = logging.getLogger("gyrocompass.serve")
POLL_S = 0.25
_GRACE_S = 5.0
"""How long a lane is left open after the last request was sent to it, at least."""


class Version(NamedTuple):
    """What a lane is opened from."""

    version: int
    artifact_id: str
    policy_id: str | None


class Trial(NamedTuple):
    """A version that is tried on users."""

    id: str
    version: Version
    arm: Callable[[str], str | None]
    """champion, challenger or shadow for a user; None: takes no part."""
    hidden: bool = False
    """Whether it is a shadow, whose answers nobody sees and no person reviews."""


class Wanted(NamedTuple):
    """What a registry says now."""

    champion: Version
    before: Version | None = None
    """Kept ready for the way back."""
    trial: Trial | None = None


class Following:
    """`Ways` that follow a registry; open it before the first request.

    Args:
        look: what is wanted now; may block, and may fail as a database does.
        open_lane: of a version, and whether nobody is to see its answers; may block for long.
    """

    def __init__(self, look: Callable[[], Wanted], open_lane: Callable[[Version, bool], Lane]) -> None:
        self._look, self._open_lane = look, open_lane
        self._lanes: dict[tuple[Version, bool], Lane] = {}
        self._wanted: Wanted | None = None
        self._idle_since: dict[tuple[Version, bool], float] = {}
        self._said = ""

    def open(self) -> Version:
        """Open what is wanted now; the champion.

        Raises:
            GyroError: it cannot be opened.
        """
        wanted = self._look()
        for version, hidden in _lanes_of(wanted):
            self._lanes[version, hidden] = self._open_lane(version, hidden)
        self._wanted = wanted
        return wanted.champion

    def of(self, user: str) -> Way:
        """See `Ways`."""
        wanted = self._wanted
        assert wanted is not None, "opened before the first request"
        champion, trial = self._lanes[wanted.champion, False], wanted.trial
        arm = None if trial is None else trial.arm(user)
        if trial is None or arm is None:
            return Way(champion)
        if arm == "champion":
            return Way(champion, trial.id, arm)
        other = self._lanes[trial.version, trial.hidden]
        return Way(champion, trial.id, "champion", other) if trial.hidden else Way(other, trial.id, arm)

    async def run(self) -> None:
        """Follow, until cancelled."""
        while True:
            await asyncio.sleep(POLL_S)
            try:
                await self._follow()
                self._said = ""
            except GyroError as error:  # the database is away, or a version cannot be opened
                if str(error) != self._said:
                    _LOG.error("what is served stays as it is: %s", error)
                    self._said = str(error)

    async def close(self) -> None:
        """See `Ways`."""
        for lane in self._lanes.values():
            await close_lane(lane)
        self._lanes.clear()

    async def _follow(self) -> None:
        wanted = await asyncio.to_thread(self._look)
        needed = _lanes_of(wanted)
        for key in needed:
            if key not in self._lanes:
                _LOG.warning("opening version %d", key[0].version)
                self._lanes[key] = await asyncio.to_thread(self._open_lane, *key)
        if self._wanted is not None and wanted.champion != self._wanted.champion:
            _LOG.warning("version %d answers now", wanted.champion.version)
        self._wanted = wanted
        await self._close_idle(set(needed))

    async def _close_idle(self, needed: set[tuple[Version, bool]]) -> None:
        """Close lanes that nobody wants and that have had nothing to do for a while."""
        now = time.monotonic()
        for key in [key for key in self._lanes if key not in needed]:
            figures = self._lanes[key].backend.figures()
            busy = any(figures.get(name, 0) for name in ("running", "waiting", "reading"))
            since = self._idle_since.setdefault(key, now)
            if busy:
                self._idle_since[key] = now
            elif now - since >= _GRACE_S:
                del self._idle_since[key]
                await close_lane(self._lanes.pop(key))
        for key in needed:
            self._idle_since.pop(key, None)


def _lanes_of(wanted: Wanted) -> list[tuple[Version, bool]]:
    """Every lane that is wanted, and whether it is hidden."""
    found: list[tuple[Version, bool]] = [(wanted.champion, False)]
    if wanted.before is not None:
        found.append((wanted.before, False))
    if wanted.trial is not None:
        found.append((wanted.trial.version, wanted.trial.hidden))
    return list(dict.fromkeys(found))
