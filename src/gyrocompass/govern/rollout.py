"""Rollouts: a version is tried on users, beside the champion, until guardrails say keep it or take it back.

    mode: canary              # shadow: it answers too, unseen; canary: for a few users; ab: for half of them
    share: 0.1                # of the users
    guardrails:               # shares of bad outcomes: more than the champion's by the margin, and it ends
      - {measure: not_answered, margin: 0.1}     # abstained, blocked, sent to people
      - {measure: failed, margin: 0.02}          # status 500 and above
      - {measure: slow, above_s: 2.0, margin: 0.1}
      - {measure: thumbs_down, margin: 0.1}
      - {measure: wrong, margin: 0.05}           # of those that people decided on
    most_users: 2000          # of each arm, after which it ends undecided

A user is in one arm for the whole rollout: a hash of the rollout and the user says in which. Who is not known
takes no part. A user counts once for each guardrail, by the first outcome, so that outcomes of
one arm are independent; the k-th of one arm is compared with the k-th of the other, in a shadow's rollout
the two of one user. With d in [-1, 1] the difference of the two bad outcomes and m the margin

    crossed at level a     H0: mean of d <= m is refused at a over the number of guardrails    --> rolled back
    kept                   H0: mean of d >= m is refused at a, for every guardrail             --> kept

by bets that are right at any time (`measure.sequential`), so looking after each answer costs nothing. A
version that is no better than the margin is rolled back with a chance of at most `a` if it is within all of
them, and kept with a chance of at most `a` if it is beyond one.
"""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import Field, model_validator
from sqlalchemy import Connection, insert, select, update

from gyrocompass.core.acts import note
from gyrocompass.core.config import Config
from gyrocompass.core.errors import BadInput
from gyrocompass.core.store import Store
from gyrocompass.core.tables_registry import RolloutRow
from gyrocompass.core.tables_serving import EventRow, ReviewRow, ThumbRow, VerdictRow
from gyrocompass.govern.registry import champion, versions
from gyrocompass.measure.calibration_metrics import wilson
from gyrocompass.measure.sequential import one_sided_p_values

Arm = Literal["champion", "challenger", "shadow"]
State = Literal["running", "kept", "rolled back", "undecided", "stopped"]
_SHARES = {"shadow": 1.0, "canary": 0.1, "ab": 0.5}
_UNANSWERED = ("abstain", "review", "block", "escalate")
_SEEN_BY_USERS = ("thumbs_down", "wrong")


class Guardrail(Config):
    """A share of bad outcomes that may be more than the champion's by a margin, and no more."""

    measure: Literal["not_answered", "failed", "slow", "thumbs_down", "wrong"]
    margin: float = Field(gt=0, lt=1)
    above_s: float | None = Field(default=None, gt=0)
    """Of `slow`: seconds until the answer was whole."""

    @model_validator(mode="after")
    def _slow_has_a_limit(self) -> Guardrail:
        if (self.measure == "slow") != (self.above_s is not None):
            raise ValueError("`above_s` is for `measure: slow`, which needs it")
        return self


class RolloutPlan(Config):
    """How a version is tried."""

    mode: Literal["shadow", "canary", "ab"]
    share: float | None = Field(default=None, gt=0, le=1)
    """Of the users; None: all for a shadow, a tenth for a canary, half for an A/B test."""
    guardrails: tuple[Guardrail, ...] = Field(min_length=1)
    level: float = Field(default=0.05, gt=0, lt=0.5)
    """Of both errors."""
    most_users: int = Field(default=2000, ge=2)
    """Of the smaller arm, after which it ends undecided."""

    @model_validator(mode="after")
    def _is_possible(self) -> RolloutPlan:
        if self.mode != "shadow" and self.part == 1:
            raise ValueError("share: somebody has to stay with the champion; give less than 1")
        unseen = [one.measure for one in self.guardrails if one.measure in _SEEN_BY_USERS]
        if self.mode == "shadow" and unseen:
            raise ValueError(f"guardrails: nobody sees a shadow's answers, so there is no {unseen[0]}")
        return self

    @property
    def part(self) -> float:
        """The share of the users."""
        return _SHARES[self.mode] if self.share is None else self.share


class Rollout(NamedTuple):
    """One trial."""

    id: str
    name: str
    version: int
    champion: int
    plan: RolloutPlan
    state: State
    why: str
    found: tuple[Mapping[str, Any], ...]
    """What was known of each guardrail when it ended."""
    at: float
    by: str
    ended_at: float | None

    def arm(self, user: str) -> Arm | None:
        """Where a user belongs; None: who is not known takes no part."""
        if not user:
            return None
        place = int.from_bytes(hashlib.sha256(f"{self.id}/{user}".encode()).digest()[:8]) / 2**64
        if place >= self.plan.part:
            return "champion"
        return "shadow" if self.plan.mode == "shadow" else "challenger"


class Known(NamedTuple):
    """What is known of a guardrail so far."""

    measure: str
    margin: float
    champion_bad: int
    champion_users: int
    challenger_bad: int
    challenger_users: int
    p_crossed: float
    """Of "it is within the margin", right at any time."""
    p_within: float
    """Of "it is beyond the margin", right at any time."""

    def shares(self) -> list[tuple[float, float, float]]:
        """Of the champion and of the challenger, each with its 95% interval (Wilson)."""
        sides = ((self.champion_bad, self.champion_users), (self.challenger_bad, self.challenger_users))
        return [(bad / n, *wilson(bad, n)) if n else (0.0, 0.0, 1.0) for bad, n in sides]


# --- begin and end ---


def start(store: Store, name: str, version: int, plan: RolloutPlan, by: str) -> Rollout:
    """Begin to try a version.

    Raises:
        BadInput: there is no such version or no champion, it is the champion, or another one is being tried.
    """
    if version not in [one.version for one in versions(store, name)]:
        raise BadInput(f"{name} has no version {version}", fix=f"gyro registry list {name}")
    before = champion(store, name)
    if before is None:
        raise BadInput(f"{name} has no champion to compare with", fix="gyro promote, with a rule")
    if before.version == version:
        raise BadInput(f"{name}:{version} is champion already")
    row = {
        "id": uuid.uuid4().hex, "name": name, "version": version, "champion": before.version,
        "plan": plan.model_dump(mode="json"), "state": "running", "why": "", "found": [], "at": time.time(),
        "by": by, "ended_at": None,
    }  # fmt: skip
    with store.database.write() as connection:
        other = _running(connection, name)
        if other is not None:
            raise BadInput(
                f"{name}:{other.version} is being tried already", fix=f"gyro rollout stop {name}, or wait"
            )
        connection.execute(insert(RolloutRow), [row])
        about = {
            "name": name,
            "version": version,
            "rollout": row["id"],
            "mode": plan.mode,
            "share": plan.part,
        }
        note(connection, by, "rollout started", about)
    return _read(row)


def running(store: Store, name: str) -> Rollout | None:
    """The trial of a name that goes on now."""
    with store.database.read() as connection:
        return _running(connection, name)


def rollouts(store: Store, name: str) -> list[Rollout]:
    """All trials of a name, the oldest first."""
    with store.database.read() as connection:
        query = select(RolloutRow.__table__).where(RolloutRow.name == name).order_by(RolloutRow.at)
        return [_read(row._asdict()) for row in connection.execute(query)]


def reopened(store: Store, rollout_id: str) -> Rollout:
    """A trial as it is now."""
    with store.database.read() as connection:
        return _by_id(connection, rollout_id)


def _by_id(connection: Connection, rollout_id: str) -> Rollout:
    row = connection.execute(select(RolloutRow.__table__).where(RolloutRow.id == rollout_id)).one()
    return _read(row._asdict())


def stop(store: Store, name: str, by: str, why: str = "") -> Rollout:
    """End a trial by hand; its users go back to the champion.

    Raises:
        BadInput: none goes on.
    """
    found = running(store, name)
    if found is None:
        raise BadInput(f"nothing of {name} is being tried", fix=f"gyro rollout status {name}")
    return _end(store, found, "stopped", why or f"by {by}", look(store, found), by)


def settle(store: Store, rollout: Rollout) -> Rollout:
    """End a trial if its guardrails, its champion or its size say so; what it is now."""
    now = champion(store, rollout.name)
    known = look(store, rollout)
    if now is None or now.version != rollout.champion:
        return _end(store, rollout, "stopped", "the champion changed meanwhile", known)
    state, why = verdict(rollout.plan, known)
    return rollout if state == "running" else _end(store, rollout, state, why, known)


def verdict(plan: RolloutPlan, known: Sequence[Known]) -> tuple[State, str]:
    """What follows from what is known."""
    crossed = [one for one in known if one.p_crossed <= plan.level / len(known)]
    if crossed:
        (bad, *_), (worse, *_) = crossed[0].shares()
        return "rolled back", (
            f"{crossed[0].measure}: {worse:.1%} of {crossed[0].challenger_users} users against {bad:.1%} of "
            f"{crossed[0].champion_users}, and {crossed[0].margin:.1%} more is allowed"
        )
    if all(one.p_within <= plan.level for one in known):
        return "kept", "every guardrail is shown to hold"
    if min(min(one.champion_users, one.challenger_users) for one in known) >= plan.most_users:
        return "undecided", f"after {plan.most_users} users of each arm it is not known whether it is worse"
    return "running", ""


def _end(
    store: Store, rollout: Rollout, state: State, why: str, known: Sequence[Known], by: str = "guardrails"
) -> Rollout:
    """The first one to end it does; the others find it ended."""
    found = [one._asdict() for one in known]
    values = {"state": state, "why": why, "found": found, "ended_at": time.time()}
    with store.database.write() as connection:
        mine = (RolloutRow.id == rollout.id, RolloutRow.state == "running")
        if connection.execute(update(RolloutRow).where(*mine).values(**values)).rowcount:
            about = {"name": rollout.name, "version": rollout.version, "rollout": rollout.id, "why": why}
            note(connection, by, f"rollout {state}", about)
        return _by_id(connection, rollout.id)


def _running(connection: Connection, name: str) -> Rollout | None:
    mine = (RolloutRow.name == name, RolloutRow.state == "running")
    row = connection.execute(select(RolloutRow.__table__).where(*mine)).first()
    return None if row is None else _read(row._asdict())


def _read(row: Mapping[str, Any]) -> Rollout:
    told = dict(row)
    return Rollout(**told | {"plan": RolloutPlan.model_validate(told["plan"]), "found": tuple(told["found"])})


# --- what is known ---


class _Outcome(NamedTuple):
    """Of one request, as far as it is known."""

    arm: str
    user: str
    at: float
    """When it was asked, or when a person decided."""
    bad: bool


def look(store: Store, rollout: Rollout) -> list[Known]:
    """What is known of each guardrail."""
    asked = {guardrail.measure for guardrail in rollout.plan.guardrails}
    with store.database.read() as connection:
        events = _events(connection, rollout.id) if asked - {*_SEEN_BY_USERS} else []
        thumbs = _thumbs(connection, rollout.id) if "thumbs_down" in asked else []
        verdicts = _verdicts(connection, rollout.id) if "wrong" in asked else []
    found = []
    for guardrail in rollout.plan.guardrails:
        if guardrail.measure == "thumbs_down":
            outcomes = thumbs
        elif guardrail.measure == "wrong":
            outcomes = verdicts
        else:
            outcomes = [one for event in events if (one := _of_event(event, guardrail)) is not None]
        found.append(_known(guardrail, outcomes, paired=rollout.plan.mode == "shadow"))
    return found


def _known(guardrail: Guardrail, outcomes: Sequence[_Outcome], *, paired: bool) -> Known:
    first: dict[str, dict[str, bool]] = {"champion": {}, "other": {}}
    for one in sorted(outcomes, key=lambda one: (one.at, one.user)):
        first["champion" if one.arm == "champion" else "other"].setdefault(one.user, one.bad)
    ours, theirs = first["other"], first["champion"]
    if paired:
        both = [user for user in ours if user in theirs]
        pairs = [(ours[user], theirs[user]) for user in both]
    else:
        pairs = list(zip(ours.values(), theirs.values(), strict=False))
    difference_N = np.array([float(own) - float(other) for own, other in pairs])
    size = 1 + guardrail.margin
    crossed, within = 1.0, 1.0
    if pairs:
        crossed = float(one_sided_p_values((difference_N - guardrail.margin) / size)[-1])
        within = float(one_sided_p_values((guardrail.margin - difference_N) / size)[-1])
    return Known(
        guardrail.measure, guardrail.margin, sum(theirs.values()), len(theirs), sum(ours.values()), len(ours),
        crossed, within,
    )  # fmt: skip


def _of_event(event: Mapping[str, Any], guardrail: Guardrail) -> _Outcome | None:
    """None: it says nothing, such as a client's mistake, or one that left."""
    status = event["status"]
    if guardrail.measure == "failed":
        if status != 200 and status < 500:
            return None
        bad = status >= 500
    elif status != 200:
        return None
    elif guardrail.measure == "slow":
        assert guardrail.above_s is not None
        bad = event["total_s"] > guardrail.above_s
    else:
        bad = event["outcome"] in _UNANSWERED
    return _Outcome(event["arm"], event["user"], event["at"], bad)


def _events(connection: Connection, rollout_id: str) -> list[Mapping[str, Any]]:
    """The first sample of each request."""
    row = EventRow
    columns = (row.arm, row.user, row.at, row.total_s, row.status, row.outcome)
    mine = (row.rollout == rollout_id, row.id.like("%-0"))
    return [found._asdict() for found in connection.execute(select(*columns).where(*mine))]


def _thumbs(connection: Connection, rollout_id: str) -> list[_Outcome]:
    query = (
        select(EventRow.arm, EventRow.user, ThumbRow.at, ThumbRow.up)
        .join(ThumbRow, ThumbRow.request_id == EventRow.request_id)
        .where(EventRow.rollout == rollout_id, EventRow.arm != "shadow", EventRow.id.like("%-0"))
    )
    return [_Outcome(arm, user, at, not up) for arm, user, at, up in connection.execute(query)]


def _verdicts(connection: Connection, rollout_id: str) -> list[_Outcome]:
    """Whatever people did not let stand was wrong."""
    query = (
        select(EventRow.arm, EventRow.user, VerdictRow.at, VerdictRow.verdict, VerdictRow.preferred)
        .join(ReviewRow, ReviewRow.request_id == EventRow.request_id)
        .join(VerdictRow, VerdictRow.review_id == ReviewRow.id)
        .where(EventRow.rollout == rollout_id, EventRow.arm != "shadow", EventRow.id.like("%-0"))
    )
    return [
        _Outcome(arm, user, at, not (said == "approve" or (said == "prefer" and preferred == 0)))
        for arm, user, at, said, preferred in connection.execute(query)
    ]
