"""Chat completions of any OpenAI-compatible server: one request, tried again where that may help.

Tried again: no connection, a time-out, 408, 409, 429 and 5xx, after

    wait_k = first * 2^k seconds, or what the server's Retry-After says

Not tried again: any other status, which the same request would meet again. Left out: streaming, tools, and
every field but the text of the first choice.
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import Field, HttpUrl, PositiveFloat

from gyrocompass.core.config import Config
from gyrocompass.core.errors import BadInput, GyroError
from gyrocompass.measure.reward import shortened

Message = dict[str, str]
"""role and content."""

_MAY_PASS = {408, 409, 429}


class ChatConfig(Config):
    """A server, a model on it, and how patiently to ask."""

    url: HttpUrl
    """The base, such as http://localhost:8000/v1."""
    model: str
    api_key_env: str | None = None
    """The environment variable that holds the key, if the server wants one."""
    temperature: float = Field(default=0.0, ge=0)
    max_tokens: int = Field(default=512, ge=1)
    timeout_s: PositiveFloat = 60.0
    retries: int = Field(default=4, ge=0)
    first_wait_s: PositiveFloat = 1.0


class _MayPass(Exception):  # noqa: N818
    """A failure that may be gone at the next attempt; the server may have said when."""

    def __init__(self, what: str, wait_s: float | None = None) -> None:
        super().__init__(what)
        self.wait_s = wait_s


def chat(config: ChatConfig, messages: Sequence[Message], sleep: Callable[[float], None]) -> str:
    """The text of the first choice.

    Raises:
        BadInput: the key's environment variable is not set.
        GyroError: the server refuses, or fails more than `retries` times.
    """
    request = _request(config, messages)
    for attempt in range(config.retries + 1):
        try:
            return _ask(request, config.timeout_s)
        except _MayPass as failure:
            if attempt == config.retries:
                raise GyroError(
                    f"the server failed {attempt + 1} times; the last time: {failure}",
                    where=request.full_url,
                    fix="see whether it runs, or raise retries and timeout_s",
                ) from failure
            sleep(config.first_wait_s * 2**attempt if failure.wait_s is None else failure.wait_s)
    raise AssertionError


def _request(config: ChatConfig, messages: Sequence[Message]) -> urllib.request.Request:
    headers = {"Content-Type": "application/json"}
    if config.api_key_env is not None:
        if config.api_key_env not in os.environ:
            raise BadInput(
                f"the environment variable {config.api_key_env} is not set", fix="set it to the key"
            )
        headers["Authorization"] = f"Bearer {os.environ[config.api_key_env]}"
    body: dict[str, Any] = {"model": config.model, "messages": [*messages]}
    body |= {"temperature": config.temperature, "max_tokens": config.max_tokens}
    url = f"{str(config.url).rstrip('/')}/chat/completions"
    return urllib.request.Request(url, json.dumps(body).encode(), headers)


def _ask(request: urllib.request.Request, timeout_s: float) -> str:
    """One attempt."""
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            answer = response.read()
    except urllib.error.HTTPError as error:
        with error:
            said = f"status {error.code}: {shortened(error.read(2000).decode(errors='replace'), 200)}"
        if error.code in _MAY_PASS or error.code >= 500:
            raise _MayPass(said, _seconds(error.headers.get("Retry-After"))) from error
        raise GyroError(
            f"the server refuses: {said}", where=request.full_url, fix="see the model's name and the key"
        ) from error
    except OSError as error:  # URLError and time-outs among them
        raise _MayPass(str(error) or type(error).__name__) from error
    return _text(answer)


def _text(answer: bytes) -> str:
    try:
        content: Any = json.loads(answer)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError) as error:
        raise _MayPass(f"not a chat completion: {shortened(answer.decode(errors='replace'))}") from error
    return content if isinstance(content, str) else ""


def _seconds(retry_after: str | None) -> float | None:
    """Retry-After in seconds; a date is not understood, and then the usual wait follows."""
    return float(retry_after) if retry_after is not None and retry_after.strip().isdecimal() else None
