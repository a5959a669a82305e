"""`gyro serve`: answers over HTTP from a model here, or from another server, behind a gate."""

from __future__ import annotations

import argparse
import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from gyrocompass.cli.model import model_folder
from gyrocompass.core.artifact import MANIFEST, read_artifact
from gyrocompass.core.config import config_hash, parse
from gyrocompass.core.errors import BadInput, GyroError, MissingDependency
from gyrocompass.core.store import Store

if TYPE_CHECKING:
    from gyrocompass.serve.backend import Backend
    from gyrocompass.serve.following import Wanted
    from gyrocompass.serve.policy import Policy
    from gyrocompass.serve.services import Ways


def serve(options: argparse.Namespace) -> int:
    """Serve until interrupted."""
    try:
        import uvicorn

        from gyrocompass.serve.app import make_app
        from gyrocompass.serve.assembly import assemble, make_lane
        from gyrocompass.serve.events import EventSettings
        from gyrocompass.serve.policy import load_policy
        from gyrocompass.serve.review import Reviews
        from gyrocompass.serve.services import OneWay, ServeSettings
        from gyrocompass.serve.sessions import secret_of
        from gyrocompass.serve.traces import write_traces
        from gyrocompass.serve.upstream import Upstream
    except ImportError as error:
        raise MissingDependency(error.name or "fastapi", extra="serve", needed_for="gyro serve") from error
    if (options.model is None) == (options.upstream is None):
        raise BadInput("give a model, or --upstream URL", fix="gyro serve --help")
    policy = None if options.policy is None else load_policy(options.policy)
    store = Store(options.store, options.store_url)
    settings = parse(
        ServeSettings,
        {
            "max_body_bytes": options.max_body_bytes,
            "max_tokens": options.max_tokens,
            "deadline_s": options.deadline_s,
            "user_secret": secret_of(store.root).hex(),
        },
        "gyro serve",
    )
    console = Console(highlight=False)
    stronger = (
        None
        if options.stronger is None
        else Upstream(
            options.stronger, model=options.stronger_model or "", api_key_env=options.stronger_key_env
        )
    )
    ways: Ways
    if options.model is not None and options.model.endswith("@champion"):
        ways, background, shown = _following(options, store, stronger, policy)
    else:
        if options.upstream is not None:
            key = options.upstream_key_env
            backend: Backend = Upstream(options.upstream, model=options.upstream_model or "", api_key_env=key)
            lineage: dict[str, str | None] = {}
        else:
            backend, lineage = _embedded(options, model_folder(options))
        queue = Reviews(store.database)
        lane = make_lane(store, backend, stronger=stronger, policy=policy, queue=queue, lineage=lineage)
        ways, background, shown = OneWay(lane), (), lineage.get("model") or backend.name
    services = assemble(
        store,
        ways,
        events=parse(EventSettings, {"texts": options.keep_texts, "days": options.keep_days}, "gyro serve"),
        open_to_all=options.host in ("127.0.0.1", "::1", "localhost"),
        background=background,
    )
    app = make_app(services, settings)
    if services.keys is None:
        console.print("no keys: whoever can reach this machine's own address may do everything", style="dim")
    console.print(f"serving {shown} at http://{options.host}:{options.port}/v1")
    traces = None if options.traces is None else write_traces(options.traces)
    logging.getLogger("gyrocompass.serve").addHandler(logging.StreamHandler())
    uvicorn.run(app, host=options.host, port=options.port, log_level="warning", access_log=False)
    if traces is not None:
        traces.shutdown()
    return 0


_SETTLE_S = 2.0
"""Between looks at the guardrails of a version on trial."""


def _following(
    options: argparse.Namespace, store: Store, stronger: Backend | None, policy: Policy | None
) -> tuple[Ways, Sequence[Callable[[], Coroutine[Any, Any, None]]], str]:
    """The champion of a name, whichever version that is; what keeps it so; and how it is told."""
    from gyrocompass.serve.assembly import make_lane
    from gyrocompass.serve.following import Following, Version
    from gyrocompass.serve.policy import kept_policy
    from gyrocompass.serve.review import Reviews
    from gyrocompass.serve.services import Lane

    name = options.model.removesuffix("@champion")
    options.name = options.name or name

    def open_lane(version: Version, hidden: bool) -> Lane:
        own = policy
        if version.policy_id is not None:
            own = kept_policy(store, version.policy_id)
        backend, lineage = _embedded(options, store.open(version.artifact_id).path)
        return make_lane(
            store,
            backend,
            stronger=stronger,
            policy=own,
            queue=None if hidden else Reviews(store.database),
            lineage=lineage | {"version": f"{name}:{version.version}"},
        )

    following = Following(lambda: wanted_of(store, name), open_lane)
    first = following.open()
    shown = f"{name}:{first.version} and whichever version is champion after it"
    return following, (following.run, partial(settle_on, store, name)), shown


def wanted_of(store: Store, name: str) -> Wanted:
    """What the registry says of a name.

    Raises:
        BadInput: it has no champion.
    """
    from gyrocompass.govern.registry import champion, champion_before, versions
    from gyrocompass.govern.rollout import running
    from gyrocompass.serve.following import Trial, Version, Wanted

    now, trial = champion(store, name), running(store, name)
    if now is None:
        raise BadInput(f"{name} has no champion", fix="gyro promote NAME VERSION --rule FILE")
    known = {
        one.version: Version(one.version, one.artifact_id, one.policy_id) for one in versions(store, name)
    }
    before = champion_before(store, name)
    return Wanted(
        known[now.version],
        None if before is None else known[before.version],
        None
        if trial is None
        else Trial(trial.id, known[trial.version], trial.arm, hidden=trial.plan.mode == "shadow"),
    )


async def settle_on(store: Store, name: str) -> None:
    """Look at the guardrails of what is on trial, again and again."""
    from gyrocompass.govern.rollout import running, settle

    def once() -> None:
        trial = running(store, name)
        if trial is not None and (now := settle(store, trial)).state != "running":
            log.warning("%s:%d is %s: %s", name, now.version, now.state, now.why)

    log = logging.getLogger("gyrocompass.serve")
    while True:
        await asyncio.sleep(_SETTLE_S)
        try:
            await asyncio.to_thread(once)
        except GyroError as error:
            log.error("guardrails wait: %s", error)


def _embedded(options: argparse.Namespace, folder: Path) -> tuple[Backend, dict[str, str | None]]:
    """A model in this process, and the ids of what it is."""
    import torch

    from gyrocompass.serve.embedded import open_embedded
    from gyrocompass.serve.engine.kinds import EngineSettings

    settings = parse(
        EngineSettings, {"most_rows": options.most_rows, "most_waiting": options.most_waiting}, "gyro serve"
    )
    dtype = None if options.precision is None else getattr(torch, options.precision)
    lineage = lineage_of(folder)
    name = options.name or lineage.get("model") or folder.resolve().name
    return open_embedded(folder, name, dtype, settings), lineage


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
