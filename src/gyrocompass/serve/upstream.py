"""Another OpenAI-compatible server as the backend: vLLM, llama.cpp, SGLang, or a hosted one.

    the client's body + logprobs --POST--> URL/v1/chat/completions --> pieces with their tokens

A request goes on as it came, its unknown fields too; added are only the log-probabilities that a gate needs
and the model's name where the client gave none. Unknown fields of the answer come back to the client.
Connections are kept open. A stream is read as a stream; a whole answer is one piece.

What another server does not tell (the entropy of a distribution, token ids) stays unknown; `gyro doctor URL`
says what else of its log-probabilities is not to be trusted.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Literal

from pydantic_core import from_json, to_json

from gyrocompass.core.errors import BadInput
from gyrocompass.serve.answer import Token
from gyrocompass.serve.backend import Job, Piece, Scored
from gyrocompass.serve.connections import Connections, NoAnswer, Reply, Silent
from gyrocompass.serve.failures import Failure

_FINISH: dict[str, Literal["stop", "length"]] = {"length": "length"}
_MESSAGE = {"role", "content", "refusal"}
_REPLY = {"id", "object", "created", "model", "choices", "usage"}
_OURS = ("slice", "deadline_s", "consent", "webhook")
_SHOWN_CHARACTERS = 500
_LISTED_S = 30.0


class Upstream:
    """A server behind ours.

    Args:
        url: where it is, without /v1.
        model: the model's name there; empty: what the client says, or its first one.
        api_key_env: the environment variable that holds its key, if it wants one.
        timeout_s: how long it may be silent.
        connections: how many requests it gets at once; the rest wait here.

    Raises:
        BadInput: the key's variable is not set.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str = "",
        api_key_env: str | None = None,
        timeout_s: float = 120.0,
        connections: int = 256,
    ) -> None:
        self.name = url.rstrip("/").removesuffix("/v1")
        self._model, headers = model, dict[str, str]()
        if api_key_env is not None:
            if api_key_env not in os.environ:
                raise BadInput(
                    f"the environment variable {api_key_env} is not set; it holds the upstream's key",
                    fix=f"export {api_key_env}=...",
                )
            headers["Authorization"] = f"Bearer {os.environ[api_key_env]}"
        self._connections = Connections(self.name, headers=headers, silent_s=timeout_s, most=connections)
        self._listed: list[dict[str, Any]] = []
        self._listed_at = 0.0

    async def models(self) -> list[dict[str, Any]]:
        """What it lists; asked for anew every half minute."""
        if self._listed and time.monotonic() - self._listed_at < _LISTED_S:
            return self._listed
        answer = await self._json("GET", "/v1/models")
        data = answer.get("data")
        if not isinstance(data, list) or not all(isinstance(one, dict) and "id" in one for one in data):
            raise Failure(502, f"the upstream lists no models: {_shown(json.dumps(answer))}")
        self._listed, self._listed_at = data, time.monotonic()
        return data

    async def write(self, job: Job) -> AsyncIterator[Piece]:
        """Hand the request on; see `Backend.write`."""
        chat = _is_chat(job.prompt)
        body = await self._body(job, chat)
        path = "/v1/chat/completions" if chat else "/v1/completions"
        if not body.get("stream"):
            answer = await self._json("POST", path, body, deadline_s=_left(job))
            for piece in _whole(answer, chat):
                yield piece
            return
        try:
            async with (
                asyncio.timeout(_left(job)),
                self._connections.ask("POST", path, _as_json(body)) as reply,
            ):
                await _accept(reply)
                async for event in _events(reply):
                    for piece in _pieces(event, chat):
                        yield piece
        except TimeoutError:
            return  # what came is told as cut
        except NoAnswer as error:
            raise _unanswered(error) from error

    async def score(self, job: Job) -> Scored:
        """By its own echo."""
        body = await self._body(job, False) | {"echo": True, "max_tokens": 0, "n": 1, "stream": False}
        body["logprobs"] = max(1, job.alternatives)
        answer = await self._json("POST", "/v1/completions", body, deadline_s=_left(job))
        try:
            told = answer["choices"][0]["logprobs"]
            tops = told.get("top_logprobs") or [None] * len(told["tokens"])
            tokens = [
                Token(text, None, math.nan if value is None else float(value), None, _alternatives(top))
                for text, value, top in zip(told["tokens"], told["token_logprobs"], tops, strict=True)
            ]
            return Scored(tokens, [int(offset) for offset in told["text_offset"]])
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise Failure(502, f"the upstream's echo has no log-probabilities: {error!r}") from error

    async def likelihoods(self, job: Job, labels: Sequence[str]) -> tuple[list[float], int]:
        """From the twenty likeliest first tokens of its answer."""
        if len(labels) > 20:
            raise Failure(404, "an upstream tells the 20 likeliest tokens: ask with at most 20 choices")
        body = await self._body(job, True)
        body |= {
            "max_tokens": 1,
            "logprobs": True,
            "top_logprobs": 20,
            "n": 1,
            "stream": False,
            "temperature": 0,
        }
        answer = await self._json("POST", "/v1/chat/completions", body, deadline_s=_left(job))
        try:
            told = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            found = [(str(one["token"]).strip(), float(one["logprob"])) for one in told]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise Failure(404, "the upstream tells no log-probabilities: it cannot decide") from error
        # What is not among the twenty is at most as likely as the last of them.
        least = min((value for _, value in found), default=-math.inf)
        mass = {label: sum(math.exp(value) for text, value in found if text == label) for label in labels}
        counted = int((answer.get("usage") or {}).get("prompt_tokens") or 0)
        return [math.log(mass[label]) if mass[label] > 0 else least for label in labels], counted

    async def tokenize(self, text: str | Sequence[Mapping[str, Any]], add_special_tokens: bool) -> list[int]:
        """By its own tokenizer."""
        body: dict[str, Any] = {"model": self._model} if self._model else {}
        if isinstance(text, str):
            body |= {"prompt": text, "add_special_tokens": add_special_tokens}
        else:
            body |= {"messages": list(text), "add_generation_prompt": True}
        answer = await self._json("POST", "/tokenize", body)
        return [int(token) for token in answer.get("tokens", [])]

    async def detokenize(self, ids: Sequence[int]) -> str:
        """By its own tokenizer."""
        answer = await self._json("POST", "/detokenize", {"tokens": list(ids)})
        return str(answer.get("prompt", answer.get("content", "")))

    async def tokenizer_info(self) -> dict[str, Any]:
        """What it says of it."""
        return await self._json("GET", "/tokenizer_info")

    async def ready(self) -> str | None:
        """Whether it lists its models."""
        self._listed_at = -_LISTED_S
        try:
            async with asyncio.timeout(5):
                await self.models()
        except (Failure, TimeoutError) as failure:
            return str(failure) or "the upstream does not answer within 5 s"
        return None

    def figures(self) -> Mapping[str, float]:
        """Requests that wait for it."""
        return {"running": self._connections.busy}

    async def close(self) -> None:
        """Close its connections."""
        self._connections.close()

    async def _body(self, job: Job, chat: bool) -> dict[str, Any]:
        body = {name: value for name, value in job.body.items() if name not in _OURS}
        body.setdefault("messages" if chat else "prompt", job.prompt)
        if not chat:
            body["prompt"] = job.prompt
        if self._model or not body.get("model"):
            body["model"] = self._model or (await self.models())[0]["id"]
        if chat and job.alternatives >= 0:
            body |= {"logprobs": True, "top_logprobs": max(job.alternatives, body.get("top_logprobs") or 0)}
        elif job.alternatives >= 0:
            body["logprobs"] = max(job.alternatives, body.get("logprobs") or 0)
        return body

    async def _json(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        deadline_s: float | None = None,
    ) -> dict[str, Any]:
        data = None if body is None else _as_json(body)
        try:
            async with asyncio.timeout(deadline_s), self._connections.ask(method, path, data) as reply:
                await _accept(reply)
                text = await reply.read()
        except TimeoutError:
            raise Failure(504, "the upstream did not answer within the deadline") from None
        except NoAnswer as error:
            raise _unanswered(error) from error
        try:
            answer = _parsed(text)
        except ValueError:
            raise Failure(502, f"the upstream did not answer in JSON: {_shown(text)}") from None
        if not isinstance(answer, dict):
            raise Failure(502, f"the upstream did not answer with an object: {_shown(text)}")
        return answer


def _as_json(body: Mapping[str, Any]) -> bytes:
    return to_json(body, inf_nan_mode="null")


def _parsed(text: bytes) -> Any:
    """JSON, a half surrogate allowed, as models write them."""
    try:
        return from_json(text, cache_strings="keys")
    except ValueError:
        return json.loads(text)


async def _accept(reply: Reply) -> None:
    """An answer of another status is a refusal."""
    if reply.status != 200:
        wait = reply.headers.get(b"retry-after", b"").decode("latin-1")
        raise _refusal(reply.status, await reply.read(), wait)


def _unanswered(error: NoAnswer) -> Failure:
    if isinstance(error, Silent):
        return Failure(504, f"the upstream does not answer: {error}")
    return Failure(502, f"the upstream cannot be asked: {error}")


def _is_chat(prompt: str | Sequence[int] | Sequence[Mapping[str, Any]]) -> bool:
    return not isinstance(prompt, str) and bool(prompt) and isinstance(prompt[0], Mapping)


def _left(job: Job) -> float | None:
    """Seconds to the deadline."""
    return None if job.deadline_s is None else max(0.0, job.received_at + job.deadline_s - time.time())


def _refusal(status: int, said: bytes, retry_after: str = "") -> Failure:
    """A client's mistake stays one; what is the upstream's fault is a 502."""
    try:
        error = json.loads(said)["error"]
        message, param, code = (error if isinstance(error, str) else error["message"]), None, None
        if isinstance(error, dict):
            param, code = error.get("param"), error.get("code")
    except (ValueError, KeyError, TypeError):
        message, param, code = _shown(said), None, None
    if status == 429 or status == 503:
        wait = float(retry_after) if retry_after.isdecimal() else 1.0
        return Failure(status, str(message), code=_word(code), retry_after_s=wait)
    if status in (401, 403):  # our key, not the client's
        return Failure(502, f"the upstream refuses our key: {message}")
    if 400 <= status < 500:
        return Failure(status, str(message), param=_word(param), code=_word(code))
    return Failure(502, f"the upstream failed with status {status}: {message}")


def _word(value: object) -> str | None:
    return None if value is None else str(value)


def _shown(said: bytes | str) -> str:
    text = said.decode(errors="replace") if isinstance(said, bytes) else said
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "…"


async def _events(reply: Reply) -> AsyncIterator[dict[str, Any]]:
    """The JSON of each event of a stream, up to [DONE]."""
    async for line in reply.lines():
        if not line.startswith(b"data:"):
            continue
        said = line[5:].strip()
        if said == b"[DONE]":
            return
        try:
            event = _parsed(said)
        except ValueError:
            raise Failure(
                502, f"the upstream's stream has an event that is not JSON: {_shown(said)}"
            ) from None
        if "error" in event:
            raise _refusal(500, said)
        yield event


def _whole(answer: Mapping[str, Any], chat: bool) -> list[Piece]:
    try:
        counted = answer.get("usage") or {}
        reply = {name: value for name, value in answer.items() if name not in _REPLY}
        found = []
        for place, choice in enumerate(answer["choices"]):
            message = choice["message"] if chat else {"content": choice["text"]}
            found.append(
                Piece(
                    int(choice.get("index", place)),
                    message.get("content") or "",
                    _tokens(choice.get("logprobs"), chat),
                    _finished(choice.get("finish_reason")) or "stop",
                    int(counted.get("prompt_tokens") or 0),
                    {name: value for name, value in message.items() if name not in _MESSAGE},
                    reply,
                )
            )
        return found
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Failure(502, f"the upstream's answer is not one of OpenAI's: {error!r}") from error


def _pieces(event: Mapping[str, Any], chat: bool) -> list[Piece]:
    try:
        counted = event.get("usage") or {}
        prompt_tokens = int(counted.get("prompt_tokens") or 0)
        reply = {name: value for name, value in event.items() if name not in _REPLY}
        found = []
        for choice in event.get("choices") or []:
            delta = (choice.get("delta") or {}) if chat else {"content": choice.get("text")}
            extra = {name: value for name, value in delta.items() if name not in _MESSAGE}
            found.append(
                Piece(
                    int(choice.get("index") or 0),
                    delta.get("content") or "",
                    _tokens(choice.get("logprobs"), chat),
                    _finished(choice.get("finish_reason")),
                    prompt_tokens,
                    extra,
                    reply,
                )
            )
        return found
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Failure(502, f"the upstream's stream is not one of OpenAI's: {error!r}") from error


def _finished(reason: object) -> Literal["stop", "length"] | None:
    return None if reason is None else _FINISH.get(str(reason), "stop")


def _tokens(told: Any, chat: bool) -> list[Token]:
    """What it tells of tokens; nothing where it tells nothing."""
    if not told:
        return []
    if chat:
        return [
            Token(str(one["token"]), None, float(one["logprob"]), None, _others(one.get("top_logprobs")))
            for one in told.get("content") or []
        ]
    values = told.get("token_logprobs") or []
    tops = told.get("top_logprobs") or [None] * len(values)
    return [
        Token(str(text), None, math.nan if value is None else float(value), None, _alternatives(top))
        for text, value, top in zip(told["tokens"], values, tops, strict=True)
    ]


def _others(told: Sequence[Mapping[str, Any]] | None) -> list[tuple[str, float]]:
    return [(str(other["token"]), float(other["logprob"])) for other in told] if told else []


def _alternatives(top: Mapping[str, float] | None) -> list[tuple[str, float]]:
    return sorted(((str(text), float(value)) for text, value in (top or {}).items()), key=lambda one: -one[1])
