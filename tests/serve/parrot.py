"""A backend without a model: it says what it was told, a letter a token, each as likely as its code says."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from gyrocompass.serve.answer import Token
from gyrocompass.serve.backend import Backend, Job, Piece, Scored
from gyrocompass.serve.failures import Failure
from gyrocompass.serve.services import Lane, OneWay, Services


def token(letter: str) -> Token:
    logprob = -float(ord(letter) % 7 + 1) / 10
    rest = math.log(-math.expm1(logprob))
    return Token(letter, ord(letter), logprob, 0.5, [(letter, logprob), ("~", rest)])


def heard(prompt: str | Sequence[int] | Sequence[Mapping[str, Any]]) -> str:
    if isinstance(prompt, str):
        return prompt
    if prompt and isinstance(prompt[0], Mapping):
        return str(prompt[-1]["content"])  # type: ignore[call-overload, index]
    return "".join(map(chr, prompt))  # type: ignore[arg-type]


class Parrot:
    """Its pause is the time each letter takes; it remembers who left early."""

    name = "parrot"

    def __init__(self, pause_s: float = 0.0, failure: Failure | None = None) -> None:
        self.pause_s, self.failure = pause_s, failure
        self.closed = False
        self.left, self.jobs = 0, list[Job]()

    async def models(self) -> list[dict[str, Any]]:
        return [{"id": "parrot", "object": "model", "created": 0, "owned_by": "tests"}]

    async def write(self, job: Job) -> AsyncIterator[Piece]:
        self.jobs.append(job)
        if self.failure is not None:
            raise self.failure
        text = heard(job.prompt)[: job.max_tokens]
        done = False
        try:
            for sample in range(job.samples):
                for place, letter in enumerate(text):
                    if self.pause_s:
                        await asyncio.sleep(self.pause_s)
                    last = place + 1 == len(text)
                    whole = len(text) == len(heard(job.prompt))
                    finish = ("stop" if whole else "length") if last else None
                    told = token(letter)._replace(alternatives=token(letter).alternatives[: job.alternatives])
                    yield Piece(sample, letter, [told], finish, len(heard(job.prompt)))  # type: ignore[arg-type]
            done = True
        finally:
            self.left += not done

    async def score(self, job: Job) -> Scored:
        letters = [token(letter) for letter in heard(job.prompt)]
        first = [letters[0]._replace(logprob=math.nan, alternatives=[])]
        return Scored([*first, *letters[1:]], list(range(len(letters))))

    async def likelihoods(self, job: Job, labels: Sequence[str]) -> tuple[list[float], int]:
        return [-float(len(labels) - place) for place in range(len(labels))], len(heard(job.prompt))

    async def tokenize(self, text: str | Sequence[Mapping[str, Any]], add_special_tokens: bool) -> list[int]:
        if not isinstance(text, str):
            text = "".join(message["content"] for message in text)
        return [ord(letter) for letter in text]

    async def detokenize(self, ids: Sequence[int]) -> str:
        if any(token_id > 0x10FFFF or 0xD800 <= token_id < 0xE000 for token_id in ids):
            raise Failure(400, "no such token")
        return "".join(map(chr, ids))

    async def tokenizer_info(self) -> dict[str, Any]:
        return {"eos_token": "", "bos_token": "", "pad_token": "", "chat_template": None}

    async def ready(self) -> str | None:
        return None if self.failure is None else self.failure.message

    def figures(self) -> Mapping[str, float]:
        return {"running": 0.0}

    async def close(self) -> None:
        self.closed = True


def alone(backend: Backend, **lane: Any) -> Services:
    """Served to everybody, without a log or keys."""
    return Services(OneWay(Lane(backend, **lane)))
