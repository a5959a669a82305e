"""A server as measures receive a model: any that speaks OpenAI's completions, asked over HTTP.

    Server --served_score---------> Score               texts to the log-probabilities of their tokens
           --served_continuations-> ScoreContinuations  contexts and what follows them
           --served_generate------> Generate            prompts to what is written

Log-probabilities of a text come by echo: its token ids, from the server's own /tokenize, are sent as a prompt
and told back with what each was worth. Ids go out, so that nothing is put before them and nothing is
tokenised twice. What a server does not tell is not made up: an entropy is NaN; a rank is 0 where the token
was the likeliest, and else how many of the told tokens were likelier, which is at least 1. Servers may round
what they tell: `gyro doctor URL` says so.

Left out: servers without echo or /tokenize, which cannot tell how likely a given text is; they can still
write.

Shape legend: N tokens of one text.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, TypeVar

import numpy as np
from pydantic import Field, HttpUrl

from gyrocompass.core.config import Config
from gyrocompass.core.errors import GyroError
from gyrocompass.core.http import Patience, UselessAnswer, ask_json, shown
from gyrocompass.measure.generate import Generate, Writing, Written, cut_at
from gyrocompass.measure.score import Score, TokenScores
from gyrocompass.measure.tasks.run import ScoreContinuations

T = TypeVar("T")
S = TypeVar("S")
_CHUNK = 256
"""Texts that are read ahead."""
_FIRST_WAIT_S = 1.0
_NONE = np.zeros(0)


class Server(Config):
    """Where the server is, and how patient we are with it."""

    url: HttpUrl
    """With or without /v1."""
    model: str | None = None
    """The name that the server gives it; None: the first that it lists."""
    timeout_s: float = Field(default=120.0, gt=0)
    attempts: int = Field(default=4, ge=1)
    parallel_requests: int = Field(default=16, ge=1)
    api_key_env: str | None = None
    """The environment variable that holds the key, if the server wants one."""

    def ask(
        self,
        path: str,
        body: Mapping[str, Any] | None,
        read: Callable[[Any], T],
        *,
        who: str = "the server",
        fix: str = "see whether it runs, and `gyro doctor URL` for what it cannot do",
        sleep: Callable[[float], None] = time.sleep,
    ) -> T:
        """What it answers on a path, as `read` takes it; the rest as for `core.http.ask_json`.

        Raises:
            BadInput: it refuses, or the key's variable is not set.
            GyroError: it cannot be reached, or fails again and again.
        """
        return ask_json(
            str(self.url).rstrip("/").removesuffix("/v1") + path,
            body,
            Patience(self.attempts, _FIRST_WAIT_S, self.timeout_s),
            read=_checked(read),
            who=who,
            fix=fix,
            api_key_env=self.api_key_env,
            sleep=sleep,
        )

    def named(self) -> Server:
        """With the name of its model."""
        if self.model is not None:
            return self
        return self.model_copy(
            update={"model": self.ask("/v1/models", None, lambda told: str(told["data"][0]["id"]))}
        )

    def many(self, one: Callable[[S], T], asked: Iterable[S]) -> Iterator[T]:
        """Side by side, answered in order, some hundreds read ahead."""
        remaining = iter(asked)
        with ThreadPoolExecutor(self.parallel_requests) as pool:
            while chunk := list(islice(remaining, _CHUNK)):
                yield from pool.map(one, chunk)


def served_score(server: Server) -> Score:
    """A server that says how likely texts are.

    The end of a text is asked about where the server tells its tokenizer's end token (/tokenizer_info).
    """
    server = server.named()

    def score(texts: Iterable[str]) -> Iterator[TokenScores]:
        end = _end(server)

        def one(text: str) -> TokenScores:
            ids = _tokens(server, text)
            scores = _echo(server, [*ids, *end], 1)
            # A character may be spread over tokens, each of which is told as a replacement: the sum is right.
            byte_N = scores.byte_N.copy()
            n_text = len(byte_N) - len(end)
            byte_N[n_text:] = 0
            if n_text > 0:
                byte_N[:n_text] = _adding_up_to(byte_N[:n_text], len(text.encode()))
            return scores._replace(byte_N=byte_N)

        yield from server.many(one, texts)

    return score


def served_continuations(server: Server) -> ScoreContinuations:
    """A server that goes on from contexts; what counts as the continuation is as for a model
    (`model.write`)."""
    server = server.named()

    def score(pairs: Iterable[tuple[str, str]], *, chat: bool = False) -> Iterator[TokenScores]:
        def one(pair: tuple[str, str]) -> TokenScores:
            context, continuation = pair
            if chat:
                before = _tokens(server, [{"role": "user", "content": context}])
                whole = [*before, *_tokens(server, continuation.lstrip(), special=False)]
            else:
                before, whole = _tokens(server, context.rstrip()), _tokens(server, context + continuation)
            return _echo(server, whole, len(before))

        yield from server.many(one, pairs)

    return score


def served_generate(server: Server) -> Generate:
    """A server that writes."""
    server = server.named()

    def generate(prompts: Sequence[str], writing: Writing) -> list[list[Written]]:
        path = "/v1/chat/completions" if writing.chat else "/v1/completions"

        def one(prompt: str) -> list[Written]:
            return server.ask(path, _writing(server, prompt, writing), lambda told: _written(told, writing))

        return list(server.many(one, prompts))

    return generate


def _tokens(server: Server, text: str | list[dict[str, str]], *, special: bool = True) -> list[int]:
    body: dict[str, Any] = {"model": server.model}
    if isinstance(text, str):
        body |= {"prompt": text, "add_special_tokens": special}
    else:
        body |= {"messages": text, "add_generation_prompt": True}
    return server.ask("/tokenize", body, lambda told: [int(token) for token in told["tokens"]])


def _end(server: Server) -> list[int]:
    """The end token, if there is one and the server says which."""
    try:
        text = server.ask("/tokenizer_info", None, lambda told: told["eos_token"])
    except GyroError:  # it has no such path
        return []
    ids = _tokens(server, text, special=False) if isinstance(text, str) else []
    return ids if len(ids) == 1 else []


def _echo(server: Server, ids: list[int], start: int) -> TokenScores:
    """The tokens from `start` on, each predicted from all before it."""
    if len(ids) <= start:
        return TokenScores(_NONE.astype(int), _NONE.astype(int), _NONE, _NONE, _NONE.astype(int))
    body = {
        "model": server.model,
        "prompt": ids,
        "echo": True,
        "max_tokens": 1,
        "logprobs": 1,
        "temperature": 0,
    }

    def read(told: Any) -> TokenScores:
        said = told["choices"][0]["logprobs"]
        if said is None or len(said["token_logprobs"]) < len(ids):
            raise ValueError("its echo has no log-probability for each token of the prompt")
        own = slice(start, len(ids))
        logprob_N = np.array([float(value) for value in said["token_logprobs"][own]])
        tops = (said.get("top_logprobs") or [None] * len(ids))[own]
        ranks = [
            sum(other > value for other in (top or {}).values())
            for value, top in zip(logprob_N.tolist(), tops, strict=True)
        ]
        sizes = [len(text.encode()) for text in said["tokens"][own]]
        return TokenScores(
            np.array(ids[own]), np.array(sizes), logprob_N, np.full(len(logprob_N), math.nan), np.array(ranks)
        )

    return server.ask("/v1/completions", body, read)


def _adding_up_to(byte_N: np.ndarray[Any, np.dtype[np.int64]], total: int) -> np.ndarray[Any, Any]:
    """Counts cut off where they pass the total; what is missing goes to the last."""
    end_N = np.minimum(np.cumsum(byte_N), total)
    end_N[-1] = total
    return np.diff(end_N, prepend=0)


def _writing(server: Server, prompt: str, writing: Writing) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": server.model,
        "max_tokens": writing.max_new_tokens,
        "n": writing.samples,
        "temperature": writing.temperature,
        "top_p": writing.top_p,
        "seed": writing.seed,
    }
    if writing.stop:
        body["stop"] = list(writing.stop)
    if writing.top_k is not None:
        body["top_k"] = writing.top_k
    if writing.chat:
        return body | {"messages": [{"role": "user", "content": prompt}], "logprobs": True}
    return body | {"prompt": prompt, "logprobs": 0}


def _written(told: Any, writing: Writing) -> list[Written]:
    found = []
    for choice in sorted(told["choices"], key=lambda one: int(one["index"])):
        said = choice.get("logprobs") or {}
        if writing.chat:
            text = choice["message"]["content"] or ""
            values = [one["logprob"] for one in said.get("content") or []]
        else:
            text, values = choice["text"], said.get("token_logprobs") or []
        text, stopped = cut_at(text, writing.stop)
        logprob_N = np.array([float(value) for value in values])
        finished = stopped or choice.get("finish_reason") != "length"
        found.append(Written(text, logprob_N, np.full(len(logprob_N), math.nan), finished))
    if len(found) != writing.samples:
        raise ValueError(f"it gave {len(found)} of {writing.samples} samples")
    return found


def _checked(read: Callable[[Any], T]) -> Callable[[Any], T]:
    """An answer in another shape is asked for again, and told."""

    def checked(told: Any) -> T:
        try:
            return read(told)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise UselessAnswer(f"not what was asked for ({error!r}): {shown(str(told))}") from error

    return checked
