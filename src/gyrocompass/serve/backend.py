"""What the HTTP surface asks of whatever writes answers: the embedded engine, or another server.

    Job --Backend.write--> Piece, Piece, ... , one list of samples per prompt
    Job --Backend.score--> the prompt's own tokens (echo)

A `Piece` is what one step adds to one sample; `Samples` gathers the pieces of a job into `Answered`s, so that
whole answers and streams are the same thing, seen at different times.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

from gyrocompass.model.decoding import Decoding
from gyrocompass.serve.answer import Answered, Token


class Job(NamedTuple):
    """One prompt to go on from."""

    id: str
    prompt: str | Sequence[int] | Sequence[Mapping[str, Any]]
    """A text, token ids, or a conversation for the chat template."""
    decoding: Decoding
    logit_bias: Mapping[int, float]
    max_tokens: int | None
    """None: as many as the context has room for."""
    samples: int
    seed: int | None
    """None: a new one each time."""
    alternatives: int
    """How many of the likeliest tokens are told in each place."""
    deadline_s: float | None
    """Seconds from `received_at`."""
    received_at: float
    """Seconds since 1970, UTC."""
    tools: Sequence[Mapping[str, Any]] = ()
    model: str = ""
    body: Mapping[str, Any] = {}
    """The request as it came, for a backend that hands it on."""

    @classmethod
    def plain(cls, messages: Sequence[Mapping[str, Any]]) -> Job:
        """A question of our own."""
        return cls(uuid.uuid4().hex, messages, Decoding(), {}, None, 1, None, 0, None, time.time())


class Piece(NamedTuple):
    """What one step adds to one sample."""

    sample: int
    text: str
    """Ready to be shown: whole characters, nothing that may turn out to begin a stop."""
    tokens: Sequence[Token]
    finish: Literal["stop", "length", "cut"] | None
    """None: it goes on."""
    prompt_tokens: int
    extra: Mapping[str, Any] = {}
    """Of another server's message: what it has and we do not know (tool_calls, reasoning, ...)."""
    reply: Mapping[str, Any] = {}
    """Of another server's whole answer, the same (system_fingerprint, service_tier, ...)."""


class Scored(NamedTuple):
    """A prompt's tokens, each after those before it; the first has no log-probability."""

    tokens: Sequence[Token]
    text_offset: Sequence[int]
    """Where each begins in the text, characters."""


class Backend(Protocol):
    """Something that writes answers."""

    name: str
    """"embedded", or a URL: where an answer came from."""

    async def models(self) -> list[dict[str, Any]]:
        """As /v1/models lists them."""

    def write(self, job: Job) -> AsyncIterator[Piece]:
        """Go on from a prompt. Leaving the iterator early cancels what is left.

        Raises:
            Failure: the job cannot be done (400), or not now (429 with Retry-After, 502, 503, 504).
        """

    async def score(self, job: Job) -> Scored:
        """The prompt's own tokens.

        Raises:
            Failure: as for `write`.
        """

    async def likelihoods(self, job: Job, labels: Sequence[str]) -> tuple[list[float], int]:
        """log p of each label as what follows the prompt, nats; and the prompt's tokens.

        Raises:
            Failure: as for `write`; or this backend cannot tell (404).
        """

    async def tokenize(self, text: str | Sequence[Mapping[str, Any]], add_special_tokens: bool) -> list[int]:
        """Ids of a text, or of messages as they are put before the model.

        Raises:
            Failure: 501 where there is no tokenizer.
        """

    async def detokenize(self, ids: Sequence[int]) -> str:
        """The text of ids.

        Raises:
            Failure: 400 for an id that is none; 404 where there is no tokenizer.
        """

    async def tokenizer_info(self) -> dict[str, Any]:
        """Its special tokens and chat template, as lm_eval asks for them."""

    async def ready(self) -> str | None:
        """None, or why it cannot answer now."""

    def figures(self) -> Mapping[str, float]:
        """Gauges for /metrics, by name."""

    async def close(self) -> None:
        """Let go of everything; running jobs end."""


class Samples:
    """The samples of a job, as far as they are written."""

    def __init__(self, job: Job, engine: str) -> None:
        self._job, self._engine = job, engine
        self._texts: list[list[str]] = [[] for _ in range(job.samples)]
        self._tokens: list[list[Token]] = [[] for _ in range(job.samples)]
        self._finish: list[Literal["stop", "length", "cut"]] = ["cut"] * job.samples
        self.extra: list[dict[str, Any]] = [{} for _ in range(job.samples)]
        self.reply: dict[str, Any] = {}
        self.prompt_tokens = 0
        self._first_at: list[float | None] = [None] * job.samples
        self._last_at: list[float] = [job.received_at] * job.samples

    def add(self, piece: Piece, now: float) -> None:
        """One more piece, at seconds since 1970."""
        place = piece.sample
        self._texts[place].append(piece.text)
        self._tokens[place].extend(piece.tokens)
        self.extra[place].update(piece.extra)
        self.reply.update(piece.reply)
        self.prompt_tokens = piece.prompt_tokens
        if self._first_at[place] is None:
            self._first_at[place] = now
        self._last_at[place] = now
        if piece.finish is not None:
            self._finish[place] = piece.finish

    def answered(self) -> list[Answered]:
        """Each sample; one that never came to its end is cut."""
        since = self._job.received_at
        return [
            Answered(
                "".join(texts),
                tokens,
                finish,
                self.prompt_tokens,
                0.0,
                (first or last) - since,
                last - since,
                self._engine,
            )
            for texts, tokens, finish, first, last in zip(
                self._texts, self._tokens, self._finish, self._first_at, self._last_at, strict=True
            )
        ]

    def completion_tokens(self) -> int:
        """Of all samples."""
        return sum(map(len, self._tokens))
