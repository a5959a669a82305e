"""A model in this process as the backend: `engine` behind the interface of `backend`."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from gyrocompass.core.errors import BadInput, GyroError
from gyrocompass.data.chat import special_literals
from gyrocompass.data.document import Message
from gyrocompass.data.encode import prompt_ids
from gyrocompass.serve.answer import Token
from gyrocompass.serve.backend import Job, Piece, Scored
from gyrocompass.serve.engine.asking import scores, steps
from gyrocompass.serve.engine.desk import Engine
from gyrocompass.serve.engine.engine import EmbeddedEngine
from gyrocompass.serve.engine.kinds import Busy, EngineSettings, Request, ScoreRequest, Told
from gyrocompass.serve.failures import Failure


class Embedded:
    """Serves one model.

    Args:
        engine: with the model in it.
        tokenizer: the model's.
        name: what clients call it.
        engine_name: what the engine is called, and whether it is approximate.
    """

    def __init__(self, engine: Engine, tokenizer: Any, name: str, engine_name: str = "embedded") -> None:
        self.name = engine_name
        self._engine, self._tokenizer, self._model_name = engine, tokenizer, name
        self._created = int(time.time())

    async def models(self) -> list[dict[str, Any]]:
        """The one that there is."""
        return [
            {
                "id": self._model_name,
                "object": "model",
                "created": self._created,
                "owned_by": "gyrocompass",
                "max_model_len": self._engine.limits.context,
                "engine": self.name,
            }
        ]

    async def write(self, job: Job) -> AsyncIterator[Piece]:
        """See `Backend.write`."""
        ids = self._checked_ids(job)
        self._engine.attach(asyncio.get_running_loop())
        stop_at = None if job.deadline_s is None else job.received_at + job.deadline_s
        requests = [
            Request(
                ids,
                job.decoding,
                job.logit_bias,
                job.max_tokens,
                None if job.seed is None else job.seed + sample,
                job.alternatives,
                stop_at,
            )
            for sample in range(job.samples)
        ]
        try:
            async for number, step in steps(self._engine, requests):
                tokens = [self._token(one) for one in step.tokens]
                yield Piece(number, step.text, tokens, step.finish, len(ids))
        except GyroError as error:
            raise _failure(error) from error

    async def score(self, job: Job) -> Scored:
        """See `Backend.score`."""
        ids = self._checked_ids(job)
        told = await self._scores([ScoreRequest(ids, 1, job.alternatives)])
        first = Token(self._decode([ids[0]]), ids[0], float("nan"), None, [])
        tokens = [first, *(self._token(one) for one in told[0])]
        return Scored(tokens, list(accumulate((len(token.text) for token in tokens[:-1]), initial=0)))

    async def likelihoods(self, job: Job, labels: Sequence[str]) -> tuple[list[float], int]:
        """log p of each label after the prompt, all its tokens counted."""
        ids = self._checked_ids(job)
        # In a chat the answer begins the message; else a blank parts it from what stands before.
        blank = "" if self._tokenizer.chat_template is not None else " "
        parts = [await self.tokenize(blank + label, False) for label in labels]
        told = await self._scores([ScoreRequest([*ids, *part], len(ids)) for part in parts])
        return [sum(one.logprob for one in part) for part in told], len(ids)

    async def tokenize(self, text: str | Sequence[Mapping[str, Any]], add_special_tokens: bool) -> list[int]:
        """With special tokens as a prompt is, without them as it stands."""
        if not isinstance(text, str):
            try:
                return self._chat_ids(text, [])
            except GyroError as error:
                raise _failure(error) from error
        if add_special_tokens:
            return prompt_ids(self._tokenizer, text)
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    async def detokenize(self, ids: Sequence[int]) -> str:
        """Special tokens are shown."""
        wrong = next((token for token in ids if token >= self._engine.limits.n_vocabulary), None)
        if wrong is not None:
            known = self._engine.limits.n_vocabulary
            raise Failure(400, f"there is no token {wrong}; the vocabulary has {known}")
        return self._decode(ids)

    async def tokenizer_info(self) -> dict[str, Any]:
        """Special tokens and chat template."""
        known = self._tokenizer
        return {
            "eos_token": known.eos_token,
            "bos_token": known.bos_token,
            "pad_token": known.pad_token,
            "chat_template": known.chat_template,
        }

    async def ready(self) -> str | None:
        """It is, once it is there."""
        return None

    def figures(self) -> Mapping[str, float]:
        """Of the engine."""
        return self._engine.figures()

    async def close(self) -> None:
        """End its thread."""
        await asyncio.to_thread(self._engine.close)

    async def _scores(self, requests: list[ScoreRequest]) -> list[list[Told]]:
        self._engine.attach(asyncio.get_running_loop())
        try:
            return await scores(self._engine, requests)
        except GyroError as error:
            raise _failure(error) from error

    def _checked_ids(self, job: Job) -> list[int]:
        try:
            return self._ids(job)
        except GyroError as error:
            raise _failure(error) from error

    def _ids(self, job: Job) -> list[int]:
        """The prompt's tokens. Ids are taken as they are: nothing is put before them."""
        prompt = job.prompt
        if isinstance(prompt, str):
            return prompt_ids(self._tokenizer, prompt)
        if prompt and isinstance(prompt[0], Mapping):
            return self._chat_ids(prompt, job.tools)  # type: ignore[arg-type]
        return list(prompt)  # type: ignore[arg-type]

    def _chat_ids(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
    ) -> list[int]:
        """Texts of special tokens in what people say stay texts: nobody can speak in another's name."""
        if not tools and all(set(message) == {"role", "content"} for message in messages):
            said = [Message(message["role"], message["content"]) for message in messages]
            return prompt_ids(self._tokenizer, said)
        if self._tokenizer.chat_template is None:
            raise BadInput("the tokenizer has no chat template", fix="give the prompt as a text")
        found = special_literals(self._tokenizer).search(json.dumps(messages, ensure_ascii=False))
        if found is not None:
            raise BadInput(f"{found[0]!r} is the text of a special token, which cannot go with tools")
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages), tools=list(tools) or None, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template raises what it likes
            raise BadInput(f"the chat template refuses the messages: {error}") from error
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _token(self, told: Told) -> Token:
        others = [(self._decode([token]), logprob) for token, logprob in told.alternatives]
        return Token(self._decode([told.id]), told.id, told.logprob, told.entropy, others)

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids)
        return text


def _failure(error: GyroError) -> Failure:
    """A mistake of the request, a full queue, or a fault of ours."""
    if isinstance(error, Busy):
        return Failure(429, str(error), code="server_full", retry_after_s=error.retry_after_s)
    return Failure(400 if error.exit_code == 2 else 503, str(error))


def open_embedded(
    folder: Path, name: str, *, dtype: torch.dtype | None = None, settings: EngineSettings | None = None
) -> Embedded:
    """Load a model folder and serve it.

    Raises:
        BadInput: it is no model folder, or cannot be served.
    """
    from gyrocompass.data.tokenizer import load_tokenizer
    from gyrocompass.model.open import open_model

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = open_model(folder, dtype=dtype, device=device), load_tokenizer(folder)
    return Embedded(EmbeddedEngine(model, tokenizer, settings), tokenizer, name)
