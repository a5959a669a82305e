"""A server of a registered name: what the registry and the rollouts say becomes lanes that follow them.

store, name --follow--> Following, and what has to run beside it
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from gyrocompass.core.artifact import MANIFEST, read_artifact
from gyrocompass.core.config import config_hash
from gyrocompass.core.errors import BadInput, GyroError
from gyrocompass.core.store import Store
from gyrocompass.govern.registry import champion, champion_before, versions
from gyrocompass.govern.rollout import running, settle
from gyrocompass.serve.assembly import make_lane
from gyrocompass.serve.backend import Backend
from gyrocompass.serve.embedded import open_embedded
from gyrocompass.serve.following import Following, Trial, Version, Wanted
from gyrocompass.serve.policy import Policy, kept_policy
from gyrocompass.serve.review import Reviews, ReviewSettings
from gyrocompass.serve.services import Lane

Background = Sequence[Callable[[], Coroutine[Any, Any, None]]]
SETTLE_S = 2.0
"""Between looks at the guardrails of a version on trial."""
_LOG = logging.getLogger("gyrocompass.serve")


def follow(
    store: Store,
    name: str,
    *,
    shown_as: str | None = None,
    stronger: Backend | None = None,
    policy: Policy | None = None,
    opened: Callable[[Path, str], Backend] = open_embedded,
    reviews: ReviewSettings | None = None,
) -> tuple[Following, Background]:
    """Lanes for the champion of a name and for what is tried beside it, not open yet.

    Args:
        store: with the registry.
        name: registered, of models.
        shown_as: what clients call the model; None: the name.
        stronger: writes what the gate escalates.
        policy: of versions that have none of their own.
        opened: opens a model's folder under a name.
        reviews: how people decide.
    """

    def open_lane(version: Version, hidden: bool) -> Lane:
        own = policy if version.policy_id is None else kept_policy(store, version.policy_id)
        folder = store.open(version.artifact_id).path
        backend = opened(folder, shown_as or name)
        lineage = lineage_of(folder) | {"version": f"{name}:{version.version}", "engine": backend.name}
        queue = None if hidden else Reviews(store.database, reviews)
        return make_lane(store, backend, stronger=stronger, policy=own, queue=queue, lineage=lineage)

    following = Following(partial(wanted_of, store, name), open_lane)
    return following, (following.run, partial(settle_on, store, name))


def wanted_of(store: Store, name: str) -> Wanted:
    """What the registry says of a name.

    Raises:
        BadInput: it has no champion.
    """
    now, trial, before = champion(store, name), running(store, name), champion_before(store, name)
    if now is None:
        raise BadInput(f"{name} has no champion", fix="gyro promote NAME VERSION --rule FILE")
    known = {
        one.version: Version(one.version, one.artifact_id, one.policy_id) for one in versions(store, name)
    }
    return Wanted(
        known[now.version],
        None if before is None else known[before.version],
        None
        if trial is None
        else Trial(trial.id, known[trial.version], trial.arm, hidden=trial.plan.mode == "shadow"),
    )


async def settle_on(store: Store, name: str) -> None:
    """Look at the guardrails of what is on trial, again and again."""

    def once() -> None:
        trial = running(store, name)
        if trial is not None and (now := settle(store, trial)).state != "running":
            _LOG.warning("%s:%d is %s: %s", name, now.version, now.state, now.why)

    while True:
        await asyncio.sleep(SETTLE_S)
        try:
            await asyncio.to_thread(once)
        except GyroError as error:
            _LOG.error("guardrails wait: %s", error)


def lineage_of(folder: Path) -> dict[str, str | None]:
    """Ids of a model and of what it was made from; nothing for a folder that is no artifact."""
    if not (folder / MANIFEST).is_file():
        return {}
    manifest = read_artifact(folder, verify=False).manifest
    parents = manifest.parents
    return {
        "model": manifest.id,
        "dataset": parents.get("data"),
        "base": parents.get("model"),
        "recipe": f"{manifest.recipe.get('kind')}-{config_hash(manifest.recipe)[:16]}",
        "code": manifest.code_version,
    }
