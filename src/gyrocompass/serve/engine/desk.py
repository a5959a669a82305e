"""What engines share: which requests can be done, how far a sequence is, and what is said to whom.

Request --Limits.room--> Written --took(token)--> Step, ... --Post--> sinks, on the asyncio loop
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from gyrocompass.core.errors import BadInput, GyroError
from gyrocompass.serve.engine.kinds import Busy, EngineSettings, Request, ScoreRequest, Sink, Step, Told
from gyrocompass.serve.engine.text import TextStream


class Engine(Protocol):
    """Writes and scores sequences of tokens."""

    limits: Limits

    def submit(self, request: Request, sink: Sink) -> Callable[[], None]:
        """Queue a sequence.

        Args:
            request: what is to be written.
            sink: called with each `Step`, and with a `GyroError` if it fails; on the loop of `attach`, or on
                the engine's thread where there is none.

        Returns:
            A function that cancels it.

        Raises:
            BadInput: the request cannot be done.
            Busy: the queue is full.
        """

    def score(self, requests: list[ScoreRequest], sink: Sink) -> None:
        """Queue sequences to be scored; `sink` gets a list with a list of `Told` for each, or a `GyroError`.

        Raises:
            BadInput: one cannot be scored.
            Busy: the queue is full.
        """

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Call sinks on this loop from now on."""

    def figures(self) -> dict[str, float]:
        """Gauges."""

    def close(self) -> None:
        """End the thread; what is not done fails."""


class Limits(NamedTuple):
    """Of a model."""

    context: int
    """Tokens, prompt and answer together."""
    n_vocabulary: int

    def room(self, request: Request) -> int:
        """How many tokens may be written.

        Raises:
            BadInput: the prompt is empty, too long, or has a token that there is not; beams are asked for.
        """
        self._check_ids(request.ids)
        room = self.context - len(request.ids)
        if room < 1:
            raise BadInput(
                f"a prompt of {len(request.ids)} tokens leaves no room in the context of {self.context}",
                fix="shorten it",
            )
        if request.decoding.beams > 1:
            raise BadInput("beams cannot be served")
        return room if request.max_tokens is None else min(room, request.max_tokens)

    def check_scored(self, requests: Sequence[ScoreRequest]) -> None:
        """Raise BadInput for a sequence that is empty, too long, or has a token that there is not."""
        for request in requests:
            self._check_ids(request.ids)
            if len(request.ids) > self.context:
                raise BadInput(
                    f"a prompt of {len(request.ids)} tokens is longer than the context of {self.context}",
                    fix="shorten it",
                )

    def _check_ids(self, ids: Sequence[int]) -> None:
        if not ids:
            raise BadInput("a prompt without a token", fix="give at least one")
        wrong = next((token for token in ids if not 0 <= token < self.n_vocabulary), None)
        if wrong is not None:
            raise BadInput(f"there is no token {wrong}; the vocabulary has {self.n_vocabulary}")


class Written:
    """A request on its way, with what is written of it.

    Args:
        request: what is asked.
        room: how many tokens it may get.
        text: of its own, to be fed with its tokens.
        sink: where its steps go.
    """

    def __init__(self, request: Request, room: int, text: TextStream, sink: Sink) -> None:
        self.request, self.room, self.sink = request, room, sink
        self.written = 0
        self.last = -1
        self.cancelled = False
        self._text = text

    def took(self, told: Told, ends: Collection[int]) -> Step | GyroError:
        """One more token; the step says whether it was the last.

        Args:
            told: of the token.
            ends: tokens after which nothing comes.
        """
        if not math.isfinite(told.logprob):
            return GyroError(f"the model says {told.logprob} of a token: its weights are at fault")
        self.last, self.written = told.id, self.written + 1
        told = told._replace(alternatives=told.alternatives[: self.request.alternatives])
        if told.id in ends:
            return Step(self._text.finish(), [told], "stop")
        text = self._text.add(told.id)
        if self._text.stopped:
            return Step(text, [told], "stop")
        if self.written >= self.room:
            text += self._text.finish()
            return Step(text, [told], "stop" if self._text.stopped else "length")
        return Step(text, [told], None)

    def cut(self) -> Step | None:
        """The last step of a sequence whose time is up; None: it is not."""
        stop_at = self.request.stop_at
        return None if stop_at is None or time.time() < stop_at else Step(self._text.finish(), [], "cut")


class Post:
    """What is said to sinks: gathered, and handed to the asyncio loop in one call."""

    def __init__(self) -> None:
        self._told: list[tuple[Sink, Any]] = []
        self._loop: asyncio.AbstractEventLoop | None = None

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Call sinks on this loop from now on."""
        self._loop = loop

    def tell(self, sink: Sink, what: Any) -> None:
        """Said at the next `hand_over`."""
        self._told.append((sink, what))

    def hand_over(self) -> None:
        """Say it; on the loop, or here where there is none."""
        told, self._told = self._told, []
        if not told:
            return

        def call() -> None:
            for sink, what in told:
                sink(what)

        if self._loop is None:
            call()
        else:
            with contextlib.suppress(RuntimeError):  # the loop was closed: nobody listens
                self._loop.call_soon_threadsafe(call)


W = TypeVar("W", bound=Written)


class Desk(Generic[W]):
    """Where requests wait for an engine's thread, and from where it is closed.

    Args:
        limits: the model's.
        settings: how much at once.
    """

    def __init__(self, limits: Limits, settings: EngineSettings | None) -> None:
        self.limits, self.settings = limits, settings or EngineSettings()
        self._lock = threading.Condition()
        self._waiting: deque[W] = deque()
        self._scores: deque[tuple[list[ScoreRequest], Sink]] = deque()
        self._closing = False
        self._post = Post()
        self._rate = 0.0
        """Tokens in a second, as of late."""
        self._thread: threading.Thread | None = None

    def score(self, requests: list[ScoreRequest], sink: Sink) -> None:
        """See `Engine.score`."""
        self.limits.check_scored(requests)
        with self._lock:
            self._admit_one_more()
            self._scores.append((requests, sink))
            self._lock.notify()

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """See `Engine.attach`."""
        self._post.attach(loop)

    def close(self) -> None:
        """See `Engine.close`."""
        with self._lock:
            self._closing = True
            self._lock.notify()
        if self._thread is not None:
            self._thread.join()

    def _begin(self, run: Callable[[], None], name: str) -> None:
        self._thread = threading.Thread(target=run, name=name, daemon=True)
        self._thread.start()

    def _queue(self, written: W) -> Callable[[], None]:
        """Let it wait; a function that cancels it."""
        with self._lock:
            self._admit_one_more()
            self._waiting.append(written)
            self._lock.notify()

        def cancel() -> None:
            written.cancelled = True

        return cancel

    def _admit_one_more(self) -> None:
        if self._closing:
            raise GyroError("the server is stopping")
        if len(self._waiting) + len(self._scores) >= self.settings.most_waiting:
            tokens = sum(one.room for one in self._waiting)
            raise Busy(min(60.0, max(1.0, tokens / max(self._rate, 100.0) / 4)))

    def _is_over(self, one: W) -> bool:
        """Whether its client left or its time is up; the latter is told."""
        if one.cancelled:
            return True
        cut = one.cut()
        if cut is not None:
            self._post.tell(one.sink, cut)
        return cut is not None
