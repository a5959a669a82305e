"""The registry: artifacts under names, in versions, with aliases; its history cannot be changed unseen.

    register(name, artifact) --> version 1, 2, ...          name@champion, name:3 --resolve--> artifact id

Versions are only added. Aliases move, each move an act in the chain of `core.acts`. `champion` is moved by a
promotion alone (`promote`), which leaves its proof, and back by `roll_back`; nothing else can.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import NamedTuple

from sqlalchemy import Connection, delete, func, insert, select

from gyrocompass.core.acts import acts, note
from gyrocompass.core.artifact import Artifact
from gyrocompass.core.database import upsert
from gyrocompass.core.errors import BadInput, did_you_mean
from gyrocompass.core.store import Store
from gyrocompass.core.tables_registry import AliasRow, VersionRow

CHAMPION = "champion"
MOVED, ROLLED_BACK = "champion moved", "champion rolled back"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")


class Version(NamedTuple):
    """One version of a name."""

    name: str
    version: int
    artifact_id: str
    at: float
    by: str
    aliases: tuple[str, ...]
    policy_id: str | None = None
    """Of a model: the policy that it is served behind, which names the calibrator."""


def register(store: Store, name: str, artifact_id: str, by: str, policy_id: str | None = None) -> Version:
    """A new version of a name; the newest one, if that is of this artifact and policy already.

    Args:
        store: that has the artifact.
        name: small letters, digits, dots, dashes and underscores.
        artifact_id: or the unique beginning of one.
        by: who does it.
        policy_id: of a model, the artifact of the policy that it is to be served behind: whatever moves the
            model moves it too, and the calibrator that it names.

    Raises:
        BadInput: the name is none, there is no such artifact, or it is of another kind than earlier ones.
    """
    if not _NAME.fullmatch(name):
        raise BadInput(f"{name!r} is no name", fix="use small letters, digits, dots, dashes and underscores")
    artifact = store.open(artifact_id, verify=False)
    policy = None if policy_id is None else _policy(store, artifact, policy_id)
    with store.database.write() as connection:
        known = list(_versions(connection, name))
        if known and (known[-1].artifact_id, known[-1].policy_id) == (artifact.id, policy):
            return known[-1]
        if known and (kind := known[0].artifact_id.rpartition("-")[0]) != artifact.manifest.kind:
            raise BadInput(
                f"{name} is a {kind}, and {artifact.id} is a {artifact.manifest.kind}",
                fix="give it another name",
            )
        version, now = len(known) + 1, time.time()
        row = {"name": name, "version": version, "artifact_id": artifact.id, "at": now, "by": by}
        connection.execute(insert(VersionRow), [row | {"policy_id": policy}])
        about = {"name": name, "version": version, "artifact": artifact.id}
        note(connection, by, "registered", about | ({} if policy is None else {"policy": policy}))
        return Version(name, version, artifact.id, now, by, (), policy)


def _policy(store: Store, artifact: Artifact, policy_id: str) -> str:
    policy = store.open(policy_id, verify=False)
    if policy.manifest.kind != "policy":
        raise BadInput(
            f"{policy.id} is of the kind {policy.manifest.kind}, not a policy", fix="gyro policy save FILE"
        )
    if artifact.manifest.kind != "model":
        raise BadInput(f"{artifact.id} is of the kind {artifact.manifest.kind}: a model has a policy")
    return policy.id


def versions(store: Store, name: str | None = None) -> list[Version]:
    """All versions, or those of one name, the oldest first."""
    with store.database.read() as connection:
        return list(_versions(connection, name))


def point(store: Store, name: str, alias: str, version: int, by: str) -> None:
    """Let an alias mean this version.

    Raises:
        BadInput: there is no such version; or the alias is `champion`, which only a promotion moves.
    """
    if alias == CHAMPION:
        raise BadInput(
            f"{CHAMPION} is moved by a promotion alone", fix=f"gyro promote {name} {version} --rule FILE"
        )
    if not _NAME.fullmatch(alias):
        raise BadInput(
            f"{alias!r} is no alias", fix="use small letters, digits, dots, dashes and underscores"
        )
    with store.database.write() as connection:
        one(connection, name, version)
        move(connection, name, alias, version, None)
        note(connection, by, "alias moved", {"name": name, "alias": alias, "version": version})


def resolve(store: Store, reference: str) -> str:
    """The artifact that `name@alias`, `name:version` or `name` (its newest version) means.

    Raises:
        BadInput: there is none.
    """
    name, at, alias = reference.partition("@")
    name, colon, number = name.partition(":")
    with store.database.read() as connection:
        known = list(_versions(connection, name))
        if not known:
            names = connection.scalars(select(VersionRow.name).distinct())
            raise BadInput(f"nothing is registered as {name!r}{did_you_mean(name, list(names))}")
    if at:
        found = [version for version in known if alias in version.aliases]
        if not found:
            raise BadInput(f"{name} has no alias {alias!r}", fix=f"gyro registry list {name}")
        return found[0].artifact_id
    if colon:
        if not number.isdecimal() or not 1 <= int(number) <= len(known):
            raise BadInput(f"{name} has no version {number}; it has 1 to {len(known)}")
        return known[int(number) - 1].artifact_id
    return known[-1].artifact_id


def artifact_named(store: Store, text: str) -> str:
    """The artifact that NAME:VERSION, NAME@ALIAS, or the unique beginning of an id means.

    Raises:
        BadInput: there is none.
    """
    return resolve(store, text) if "@" in text or ":" in text else store.open(text, verify=False).id


def champion(store: Store, name: str) -> Version | None:
    """The version that is champion now."""
    return next((version for version in versions(store, name) if CHAMPION in version.aliases), None)


def roll_back(store: Store, name: str, by: str) -> Version:
    """Make the champion before this one champion again.

    Raises:
        BadInput: there was none before.
    """
    line = _champions(store, name)
    if len(line) < 2:
        raise BadInput(f"{name} had no champion before this one", fix=f"gyro registry list {name}")
    (current, _), (version, decision) = line[-1], line[-2]
    with store.database.write() as connection:
        found = one(connection, name, version)
        move(connection, name, CHAMPION, version, decision)
        about = {"name": name, "from": current, "to": version, "decision": decision, "rolled_back": True}
        note(connection, by, ROLLED_BACK, about)
    return found


def champion_before(store: Store, name: str) -> Version | None:
    """The version that a rollback would bring back."""
    line = _champions(store, name)
    return next(
        (known for known in versions(store, name) if len(line) > 1 and known.version == line[-2][0]), None
    )


def _champions(store: Store, name: str) -> list[tuple[int, str | None]]:
    """Champions that a rollback can go along, the first one first, each with its decision."""
    past = [act["about"] for act in acts(store.database) if act["act"] in (MOVED, ROLLED_BACK)]
    line: list[tuple[int, str | None]] = []
    for about in (about for about in past if about["name"] == name):
        if about["rolled_back"]:
            line.pop()
        else:
            line.append((about["to"], about["decision"]))
    return line


def crown(
    connection: Connection, name: str, version: int, decision_id: str, by: str, judged: Version | None
) -> None:
    """Make a version champion, in the transaction of a promotion.

    Raises:
        BadInput: the champion is no longer the one that was judged against.
    """
    before = next((one for one in _versions(connection, name) if CHAMPION in one.aliases), None)
    if (before and before.version) != (judged and judged.version):
        raise BadInput(f"the champion of {name} has changed meanwhile", fix="promote again")
    move(connection, name, CHAMPION, version, decision_id)
    about = {
        "name": name, "from": None if before is None else before.version, "to": version,
        "decision": decision_id, "rolled_back": False,
    }  # fmt: skip
    note(connection, by, MOVED, about)


def move(connection: Connection, name: str, alias: str, version: int, decision_id: str | None) -> None:
    """Let an alias mean a version; the act is the caller's to note."""
    row = {"name": name, "alias": alias, "version": version, "decision_id": decision_id}
    upsert(connection, AliasRow, [row], renewed=["version", "decision_id"])


def drop_alias(store: Store, name: str, alias: str, by: str) -> None:
    """Take an alias away.

    Raises:
        BadInput: there is none, or it is `champion`.
    """
    if alias == CHAMPION:
        raise BadInput(f"{CHAMPION} is moved by a promotion alone")
    with store.database.write() as connection:
        where = (AliasRow.name == name, AliasRow.alias == alias)
        if not connection.execute(delete(AliasRow).where(*where)).rowcount:
            raise BadInput(f"{name} has no alias {alias!r}")
        note(connection, by, "alias dropped", {"name": name, "alias": alias})


def one(connection: Connection, name: str, version: int) -> Version:
    """A version.

    Raises:
        BadInput: there is none.
    """
    found = next((known for known in _versions(connection, name) if known.version == version), None)
    if found is None:
        count = connection.scalar(select(func.count()).where(VersionRow.name == name))
        raise BadInput(f"{name} has no version {version}; it has {count}", fix="gyro registry list")
    return found


def _versions(connection: Connection, name: str | None) -> Iterator[Version]:
    query = select(VersionRow.__table__).order_by(VersionRow.name, VersionRow.version)
    pointing = select(AliasRow.__table__)
    if name is not None:
        query, pointing = query.where(VersionRow.name == name), pointing.where(AliasRow.name == name)
    aliases: dict[tuple[str, int], list[str]] = {}
    for row in connection.execute(pointing):
        aliases.setdefault((row.name, row.version), []).append(row.alias)
    for row in connection.execute(query):
        own = tuple(sorted(aliases.get((row.name, row.version), [])))
        yield Version(row.name, row.version, row.artifact_id, row.at, row.by, own, row.policy_id)
