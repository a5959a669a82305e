"""A server of a registered name in a thread of this process, for as long as a block runs."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from gyrocompass.core.errors import GyroError
from gyrocompass.core.store import Store
from gyrocompass.recipe.serving import follow
from gyrocompass.serve.app import make_app
from gyrocompass.serve.assembly import assemble
from gyrocompass.serve.events import EventSettings
from gyrocompass.serve.review import ReviewSettings
from gyrocompass.serve.services import ServeSettings
from gyrocompass.serve.sessions import secret_of

_START_S = 30.0


@contextmanager
def serving(store: Store, name: str) -> Iterator[str]:
    """Serve the champion of a name on a free port of this machine's own address; its URL.

    Raises:
        GyroError: it does not start.
    """
    reviews = ReviewSettings(double_share=0.0)  # one person looks: the demo has no second one
    ways, background = follow(store, name, reviews=reviews)
    ways.open()
    services = assemble(
        store, ways, events=EventSettings(texts="masked"), reviews=reviews, background=background
    )
    app = make_app(services, ServeSettings(user_secret=secret_of(store.root).hex()))
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="on"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    until = time.monotonic() + _START_S
    while not server.started:
        if time.monotonic() > until or not thread.is_alive():
            raise GyroError("the demo's server does not start", fix="gyro doctor")
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(_START_S)
