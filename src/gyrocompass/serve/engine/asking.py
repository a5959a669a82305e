"""The engine from the asyncio loop: requests whose steps are awaited, and scores."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Any

from gyrocompass.core.errors import GyroError
from gyrocompass.serve.engine.desk import Engine
from gyrocompass.serve.engine.kinds import Request, ScoreRequest, Step, Told


async def steps(engine: Engine, requests: Sequence[Request]) -> AsyncIterator[tuple[int, Step]]:
    """Write several sequences; what comes of each, with its number. Leaving early cancels all.

    Raises:
        BadInput: one of them cannot be done.
        Busy: the queue is full.
        GyroError: the engine failed.
    """
    queue: asyncio.Queue[tuple[int, Step | GyroError]] = asyncio.Queue()
    cancels: list[Callable[[], None]] = []
    try:
        for number, request in enumerate(requests):
            sink = partial(_put, queue, number)
            if request.decoding.is_constrained:  # a grammar is made, which takes its time
                cancels.append(await asyncio.to_thread(engine.submit, request, sink))
            else:
                cancels.append(engine.submit(request, sink))
        left = len(requests)
        while left:
            number, step = await queue.get()
            if isinstance(step, GyroError):
                raise step
            left -= step.finish is not None
            yield number, step
    finally:
        for cancel in cancels:
            cancel()


def _put(queue: asyncio.Queue[tuple[int, Step | GyroError]], number: int, what: Step | GyroError) -> None:
    queue.put_nowait((number, what))


async def scores(engine: Engine, requests: list[ScoreRequest]) -> list[list[Told]]:
    """Score sequences.

    Raises:
        BadInput: one cannot be scored.
        Busy: the queue is full.
        GyroError: the engine failed.
    """
    answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def take(what: Any) -> None:
        if not answer.done():
            answer.set_result(what)

    engine.score(requests, take)
    found = await answer
    if isinstance(found, GyroError):
        raise found
    told: list[list[Told]] = found
    return told
