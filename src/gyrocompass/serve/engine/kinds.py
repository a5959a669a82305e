"""What the engine is asked and what it says: settings, requests, steps, tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from pydantic import Field

from gyrocompass.core.config import Config
from gyrocompass.core.errors import GyroError
from gyrocompass.model.decoding import Decoding


class EngineSettings(Config):
    """How much at once."""

    most_rows: int = Field(default=32, ge=1)
    """Sequences that decode together."""
    most_waiting: int = Field(default=256, ge=1)
    """Requests that wait; one more is refused."""
    memory_tokens: int = Field(default=65536, ge=64)
    """Positions of keys and values that decoding may take."""
    prefix_tokens: int = Field(default=32768, ge=0)
    """Tokens of prompts that are remembered."""
    chunk_tokens: int = Field(default=256, ge=8)
    """Of a prompt, read in one turn."""


class Busy(GyroError):  # noqa: N818
    """The queue is full."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__("the server is full", fix=f"try again in {math.ceil(retry_after_s)} s")
        self.retry_after_s = retry_after_s


class Request(NamedTuple):
    """One sequence to write."""

    ids: Sequence[int]
    """Of the prompt."""
    decoding: Decoding = Decoding()
    logit_bias: Mapping[int, float] = {}
    max_tokens: int | None = None
    """None: to the end of the context."""
    seed: int | None = None
    """None: one of its own."""
    alternatives: int = 0
    stop_at: float | None = None
    """A time (`time.time`) at which it is cut."""


class Told(NamedTuple):
    """What the model says of one token, untouched by any setting."""

    id: int
    logprob: float
    entropy: float
    alternatives: list[tuple[int, float]]


class Step(NamedTuple):
    """What a turn added to a sequence."""

    text: str
    tokens: list[Told]
    finish: Literal["stop", "length", "cut"] | None


class ScoreRequest(NamedTuple):
    """A sequence whose tokens from `start` on are to be scored, at least the first being given."""

    ids: Sequence[int]
    start: int = 1
    alternatives: int = 0


Sink = Callable[[Any], None]
"""Takes what comes of a request."""
