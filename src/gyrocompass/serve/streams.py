"""Answers as streams: chunks of server-sent events, made of pieces as they come or of whole answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Coroutine, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from gyrocompass.serve import render
from gyrocompass.serve.backend import Piece
from gyrocompass.serve.exchange import Outcome
from gyrocompass.serve.failures import Failure

T = TypeVar("T")
_UNWATCHED_S = 0.05
"""An answer within this time is written whether or not somebody still waits for it."""


class Chunks(Protocol):
    """How pieces become chunks of a stream."""

    def of(self, place: int, piece: Piece) -> list[dict[str, Any]]:
        """Choices of the chunks that show one piece, of the choice in this place."""

    def whole(self, choice: dict[str, Any], outcome: Outcome) -> list[dict[str, Any]]:
        """Choices of the chunks that show a whole answer, which the gate has seen."""


class ChatChunks:
    """Deltas of messages: the role first, then text, then why it ended."""

    def __init__(self, logprobs: bool, alternatives: int, tools: bool) -> None:
        self._logprobs, self._alternatives, self._tools = logprobs, alternatives, tools
        self._begun: set[int] = set()
        self._held: dict[int, list[Piece]] = {}

    def of(self, place: int, piece: Piece) -> list[dict[str, Any]]:
        """Of one piece."""
        found = self._begin(place)
        if self._tools:  # a call is only known when it is whole
            held = self._held.setdefault(place, [])
            held.append(piece)
            if piece.finish is None:
                return found
            text = "".join(one.text for one in held)
            content, calls = render.split_calls(text, f"{id(held):x}", place)
            delta: dict[str, Any] = {"content": content} if content else {}
            if calls:
                delta["tool_calls"] = [{"index": number, **call} for number, call in enumerate(calls)]
            tokens = [token for one in held for token in one.tokens]
            found.append(self._chunk(place, delta, tokens, None))
            return [*found, self._chunk(place, {}, [], "tool_calls" if calls else piece.finish)]
        if piece.text or piece.tokens or piece.extra:
            delta = {**piece.extra, **({"content": piece.text} if piece.text or piece.tokens else {})}
            found.append(self._chunk(place, delta, piece.tokens, None))
        if piece.finish is not None:
            found.append(self._chunk(place, {}, [], piece.finish))
        return found

    def whole(self, choice: dict[str, Any], outcome: Outcome) -> list[dict[str, Any]]:
        """Of an answer that the gate has seen."""
        place, message = choice["index"], choice["message"]
        delta = {name: value for name, value in message.items() if name != "role" and value is not None}
        if "tool_calls" in delta:
            delta["tool_calls"] = [
                {"index": number, **call} for number, call in enumerate(delta["tool_calls"])
            ]
        last = {name: value for name, value in choice.items() if name not in ("message", "logprobs")}
        text = {"index": place, "delta": delta, "finish_reason": None, "logprobs": choice["logprobs"]}
        return [*self._begin(place), text, {**last, "delta": {}, "logprobs": None}]

    def _begin(self, place: int) -> list[dict[str, Any]]:
        if place in self._begun:
            return []
        self._begun.add(place)
        return [self._chunk(place, {"role": "assistant", "content": ""}, [], None)]

    def _chunk(
        self, place: int, delta: dict[str, Any], tokens: Sequence[Any], finish: str | None
    ) -> dict[str, Any]:
        told = render.chat_logprobs(tokens, self._alternatives) if self._logprobs and tokens else None
        reason, cut = ("length", {"cut": True}) if finish == "cut" else (finish, {})
        return {"index": place, "delta": delta, "logprobs": told, "finish_reason": reason, **cut}


class TextChunks:
    """Pieces of text."""

    def __init__(self, logprobs: int | None) -> None:
        self._logprobs = logprobs
        self._length: dict[int, int] = {}

    def of(self, place: int, piece: Piece) -> list[dict[str, Any]]:
        """Of one piece."""
        start = self._length.get(place, 0)
        self._length[place] = start + sum(len(token.text) for token in piece.tokens)
        told = None
        if self._logprobs is not None and piece.tokens:
            told = render.completion_logprobs(None, piece.tokens, self._logprobs, start)
        reason, cut = ("length", {"cut": True}) if piece.finish == "cut" else (piece.finish, {})
        return [{"index": place, "text": piece.text, "logprobs": told, "finish_reason": reason, **cut}]

    def whole(self, choice: dict[str, Any], outcome: Outcome) -> list[dict[str, Any]]:
        """Of an answer that the gate has seen."""
        return [choice]


async def merged(sources: Sequence[AsyncIterator[Piece]]) -> AsyncIterator[tuple[int, Piece]]:
    """Pieces of several iterators as they come, each with its iterator's place."""
    if len(sources) == 1:
        async for piece in sources[0]:
            yield 0, piece
        return
    queue: asyncio.Queue[tuple[int, Piece] | None] = asyncio.Queue(maxsize=64)

    async def drain(place: int, source: AsyncIterator[Piece]) -> None:
        async for piece in source:
            await queue.put((place, piece))

    async def all_of_them() -> None:
        try:
            await together([drain(place, source) for place, source in enumerate(sources)])
        finally:
            await queue.put(None)

    task = asyncio.ensure_future(all_of_them())
    try:
        while (found := await queue.get()) is not None:
            yield found
        await task
    finally:
        task.cancel()


async def together(coroutines: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All at once; the first failure ends the others and is raised as it is."""
    tasks = [asyncio.ensure_future(one) for one in coroutines]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


class Watcher:
    """Ends the work for clients that have left.

    Most answers are there before anybody leaves, so a request is looked at only once it has lasted a while,
    by one timer for all of them.
    """

    def __init__(self) -> None:
        self._young: dict[asyncio.Task[Any], Request] = {}
        self._watched: dict[asyncio.Task[Any], asyncio.Future[None]] = {}
        self._left: set[asyncio.Task[Any]] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def until_gone(self, request: Request, coroutine: Awaitable[T]) -> T:
        """What a coroutine gives, unless the client leaves first: then it is cancelled.

        Raises:
            Failure: 499, which nobody reads.
        """
        task = asyncio.current_task()
        assert task is not None, "a coroutine runs in a task"
        self._young[task] = request
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_UNWATCHED_S, self._watch)
        try:
            return await coroutine
        except asyncio.CancelledError:
            if task in self._left and task.uncancel() == 0:
                raise Failure(499, "the client left") from None
            raise
        finally:
            if self._young.pop(task, None) is None:
                self._watched.pop(task).cancel()
                self._left.discard(task)

    def _watch(self) -> None:
        """Listen for the end of requests that are not new any more."""
        self._timer = None
        for task, request in self._young.items():
            watch = self._watched[task] = asyncio.ensure_future(_gone(request))
            watch.add_done_callback(partial(self._leave, task))
        self._young.clear()

    def _leave(self, task: asyncio.Task[Any], watch: asyncio.Future[None]) -> None:
        if self._watched.get(task) is watch and not watch.cancelled():
            self._left.add(task)
            task.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def events(chunks: AsyncIterator[dict[str, Any]], source: Any = None) -> Response:
    """A stream of server-sent events; a failure on the way is its last event."""

    async def lines() -> AsyncIterator[bytes]:
        try:
            async for chunk in chunks:
                yield b"data: " + json.dumps(chunk, allow_nan=False).encode() + b"\n\n"
        except Failure as failure:
            yield b"data: " + json.dumps(failure.body()).encode() + b"\n\n"
        finally:
            if source is not None:
                await source.aclose()
        yield b"data: [DONE]\n\n"

    return StreamingResponse(lines(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


async def one_chunk(head: Mapping[str, Any], choices: Sequence[Any]) -> AsyncIterator[dict[str, Any]]:
    """A stream that is whole already: a chunk for each choice."""
    for choice in choices:
        yield {**head, "choices": [choice]}
