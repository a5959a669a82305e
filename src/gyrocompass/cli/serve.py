"""`gyro serve`: answers over HTTP from a model here, or from another server, behind a gate."""

from __future__ import annotations

import argparse
import gc
import logging
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from gyrocompass.cli.model import model_folder
from gyrocompass.core.config import parse
from gyrocompass.core.errors import BadInput, MissingDependency
from gyrocompass.core.store import Store

if TYPE_CHECKING:
    from gyrocompass.recipe.serving import Background
    from gyrocompass.serve.backend import Backend
    from gyrocompass.serve.policy import Policy
    from gyrocompass.serve.services import Ways


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
    stronger = (
        None
        if options.stronger is None
        else Upstream(
            options.stronger, model=options.stronger_model or "", api_key_env=options.stronger_key_env
        )
    )
    ways: Ways
    background: Background = ()
    if options.model is not None and options.model.endswith("@champion"):
        from gyrocompass.recipe.serving import follow

        name = options.model.removesuffix("@champion")
        ways, background = follow(
            store,
            name,
            shown_as=options.name,
            stronger=stronger,
            policy=policy,
            opened=_opened(options, store),
        )
        shown = f"{name}:{ways.open().version} and whichever version is champion after it"
    else:
        ways, shown = _one_way(options, store, stronger, policy)
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
    # What was imported stays: the collector need not look through it while requests wait.
    gc.collect()
    gc.freeze()
    # The thread that writes events lets requests go first after half a millisecond, not after five.
    sys.setswitchinterval(0.0005)
    uvicorn.run(
        app,
        host=options.host,
        port=options.port,
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
    )
    if traces is not None:
        traces.shutdown()
    return 0


def _one_way(
    options: argparse.Namespace, store: Store, stronger: Backend | None, policy: Policy | None
) -> tuple[Ways, str]:
    """A model here, or another server; and what it is called."""
    from gyrocompass.recipe.serving import lineage_of
    from gyrocompass.serve.assembly import make_lane
    from gyrocompass.serve.review import Reviews
    from gyrocompass.serve.services import OneWay
    from gyrocompass.serve.upstream import Upstream

    lineage: dict[str, str | None] = {}
    if options.upstream is not None:
        key = options.upstream_key_env
        backend: Backend = Upstream(options.upstream, model=options.upstream_model or "", api_key_env=key)
        shown = options.upstream
    else:
        folder = model_folder(options)
        lineage = lineage_of(folder)
        name = options.name or lineage.get("model") or folder.resolve().name
        backend = _opened(options, store)(folder, name)
        lineage |= {"engine": backend.name}
        shown = f"{name} ({backend.name})"
    queue = Reviews(store.database)
    lane = make_lane(store, backend, stronger=stronger, policy=policy, queue=queue, lineage=lineage)
    return OneWay(lane), shown


def _opened(options: argparse.Namespace, store: Store) -> Callable[[Path, str], Backend]:
    """What opens a model's folder under a name, with the engine that was asked for."""
    from gyrocompass.serve.engine.kinds import EngineSettings

    rows = {"most_rows": options.most_rows, "most_waiting": options.most_waiting}
    settings = parse(EngineSettings, rows, "gyro serve")
    if options.engine == "ctranslate2":
        from gyrocompass.serve.engine.converted import open_converted
        from gyrocompass.serve.engine.ct2 import Weights

        if options.precision == "bfloat16":
            raise BadInput("ctranslate2 has float32 and int8 here", fix="--precision float32, or int8")
        weights: Weights = "int8" if options.precision == "int8" else "float32"
        return partial(open_converted, kept=store.root / "converted", weights=weights, settings=settings)
    import torch

    from gyrocompass.serve.embedded import open_embedded

    if options.precision == "int8":
        raise BadInput("the embedded engine has no int8", fix="--engine ctranslate2")
    dtype = None if options.precision is None else getattr(torch, options.precision)
    return partial(open_embedded, dtype=dtype, settings=settings)
