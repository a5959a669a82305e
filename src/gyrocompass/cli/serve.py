"""`gyro serve`: answers over HTTP from a model here, or from another server, behind a gate."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from gyrocompass.cli.model import model_folder
from gyrocompass.core.artifact import MANIFEST, read_artifact
from gyrocompass.core.config import config_hash, parse
from gyrocompass.core.errors import BadInput, MissingDependency
from gyrocompass.core.store import Store

if TYPE_CHECKING:
    from gyrocompass.serve.backend import Backend


def serve(options: argparse.Namespace) -> int:
    """Serve until interrupted."""
    try:
        import uvicorn

        from gyrocompass.serve.app import make_app
        from gyrocompass.serve.assembly import assemble
        from gyrocompass.serve.events import EventSettings
        from gyrocompass.serve.policy import load_policy
        from gyrocompass.serve.services import ServeSettings
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
    backend: Backend
    lineage: dict[str, str | None] = {}
    if options.upstream is not None:
        backend = Upstream(
            options.upstream, model=options.upstream_model or "", api_key_env=options.upstream_key_env
        )
    else:
        backend, lineage = _embedded(options)
    stronger = (
        None
        if options.stronger is None
        else Upstream(
            options.stronger, model=options.stronger_model or "", api_key_env=options.stronger_key_env
        )
    )
    services = assemble(
        store,
        backend,
        stronger=stronger,
        policy=policy,
        events=parse(EventSettings, {"texts": options.keep_texts, "days": options.keep_days}, "gyro serve"),
        lineage=lineage,
        open_to_all=options.host in ("127.0.0.1", "::1", "localhost"),
    )
    app = make_app(services, settings)
    if services.keys is None:
        console.print("no keys: whoever can reach this machine's own address may do everything", style="dim")
    console.print(
        f"serving {lineage.get('model') or backend.name} at http://{options.host}:{options.port}/v1"
    )
    traces = None if options.traces is None else write_traces(options.traces)
    logging.getLogger("gyrocompass.serve").addHandler(logging.StreamHandler())
    uvicorn.run(app, host=options.host, port=options.port, log_level="warning", access_log=False)
    if traces is not None:
        traces.shutdown()
    return 0


def _embedded(options: argparse.Namespace) -> tuple[Backend, dict[str, str | None]]:
    """A model in this process, and the ids of what it is."""
    import torch

    from gyrocompass.serve.embedded import open_embedded
    from gyrocompass.serve.engine.kinds import EngineSettings

    folder = model_folder(options)
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
