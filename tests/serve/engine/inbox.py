"""What an engine says of a request, gathered."""

from __future__ import annotations

import threading
from typing import Any

from gyrocompass.core.errors import GyroError
from gyrocompass.serve.engine.desk import Engine
from gyrocompass.serve.engine.kinds import Request, ScoreRequest, Step, Told


class Inbox:
    """What came for one request."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.error: GyroError | None = None
        self.ended = threading.Event()

    def __call__(self, what: Any) -> None:
        if isinstance(what, GyroError):
            self.error = what
            self.ended.set()
            return
        self.steps.append(what)
        if what.finish is not None:
            self.ended.set()

    def wait(self) -> Inbox:
        assert self.ended.wait(60)
        if self.error is not None:
            raise self.error
        return self

    @property
    def text(self) -> str:
        return "".join(step.text for step in self.steps)

    @property
    def tokens(self) -> list[Told]:
        return [token for step in self.steps for token in step.tokens]


def ask(engine: Engine, request: Request) -> Inbox:
    inbox = Inbox()
    engine.submit(request, inbox)
    return inbox


def scored(engine: Engine, requests: list[ScoreRequest]) -> list[list[Told]]:
    found: list[Any] = []
    came = threading.Event()
    engine.score(requests, lambda what: (found.append(what), came.set()))
    assert came.wait(60)
    if isinstance(found[0], GyroError):
        raise found[0]
    told: list[list[Told]] = found[0]
    return told
