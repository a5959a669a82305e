"""When a cycle of the loop is due, by what the store knows."""

from __future__ import annotations

from sqlalchemy import func, select

from gyrocompass.core.errors import BadInput
from gyrocompass.core.store import Store
from gyrocompass.core.tables_serving import AdminAct, ReviewRow
from gyrocompass.measure.drift import watch
from gyrocompass.recipe.forgetting import FORGOTTEN
from gyrocompass.recipe.loop.config import Trigger
from gyrocompass.recipe.loop.suggest import suggestions
from gyrocompass.serve.events import read_events

MOST_EVENTS = 20_000
RUN_LENGTH = 10_000.0
"""Events, on average at least, between two false alarms."""


def decided(store: Store) -> int:
    """How many answers people have decided on so far, those of users who were forgotten since among them."""
    with store.database.read() as connection:
        query = select(func.count()).where(ReviewRow.state == "decided")
        forgotten = select(AdminAct.about).where(AdminAct.act == FORGOTTEN)
        gone = sum(int(about["decided"]) for about in connection.scalars(forgotten))
        return int(connection.scalar(query) or 0) + gone


def due(
    store: Store,
    trigger: Trigger,
    *,
    now: float,
    last_at: float | None,
    last_decided: int,
    touched: bool = False,
    fresh: str | None = None,
) -> str | None:
    """Why a cycle is due; None: it is not.

    Counts decide wherever they can: a clock that jumps loses nothing. One that jumped back since the last
    cycle makes `hours` wait anew; one that jumped ahead makes it come early.

    Args:
        store: with reviews and events.
        trigger: of the loop.
        now: seconds since 1970.
        last_at: when the last cycle began; None: there was none.
        last_decided: what `decided` was then.
        touched: whether the champion has to be trained again, since what it learned from was forgotten.
        fresh: the champion's artifact, if no cycle has begun from it yet.
    """
    new = decided(store) - last_decided
    if touched and decided(store):
        return "the champion learned from what was forgotten"
    if new <= 0:
        return None
    if trigger.verdicts is not None and new >= trigger.verdicts:
        return f"{new} new verdicts"
    if trigger.hours is not None and (last_at is None or now - last_at >= 3600 * trigger.hours):
        return f"{trigger.hours:g} hours have passed, with {new} new verdicts"
    if trigger.drift and (alarm := _alarm(store, last_at or 0.0)):
        return alarm
    if trigger.plateau and fresh is not None:
        return _plateau(store, fresh)
    return None


def _plateau(store: Store, model: str) -> str | None:
    """Of the slices that a model's training no longer helped, the first."""
    try:
        found = suggestions(store.open(model, verify=False))
    except BadInput:  # its folder is gone, and its training with it
        return None
    return f"{found[0].slice} {found[0].state}: {found[0].why}" if found else None


def _alarm(store: Store, since: float) -> str | None:
    """Of all that is asked, and of each slice alone; false alarms stay as rare as those of one watch."""
    read = [event for event in read_events(store.database, since) if event["status"] == 200][-MOST_EVENTS:]
    slices = sorted({event["slice"] for event in read if event["slice"]})
    parts = {"": read} | {name: [event for event in read if event["slice"] == name] for name in slices}
    for name, events in parts.items():
        for watched in watch(events, run_length=RUN_LENGTH * len(parts)) if events else ():
            if watched.alarms:
                last = watched.alarms[-1]
                of = f" of {name}" if name else ""
                return f"drift: {last.quantity}{of} was {last.before:.3g} and is {last.now:.3g}"
    return None
