"""Chat completions of any OpenAI-compatible server: one request, asked again where that may help.

What is asked again, and when, stands in `core.http`; besides, an answer that is no chat completion is. Left
out: streaming, tools, and every field but the text of the first choice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pydantic import Field, HttpUrl, PositiveFloat

from gyrocompass.core.config import Config
from gyrocompass.core.http import Patience, UselessAnswer, ask_json, shown

Message = dict[str, str]
"""role and content."""


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


def chat(config: ChatConfig, messages: Sequence[Message], sleep: Callable[[float], None]) -> str:
    """The text of the first choice.

    Raises:
        BadInput: the key's environment variable is not set, or the server refuses.
        GyroError: it fails more than `retries` times.
    """
    body: dict[str, Any] = {"model": config.model, "messages": [*messages]}
    body |= {"temperature": config.temperature, "max_tokens": config.max_tokens}
    return ask_json(
        f"{str(config.url).rstrip('/')}/chat/completions",
        body,
        Patience(config.retries + 1, config.first_wait_s, config.timeout_s),
        read=_text,
        who="the server",
        fix="see whether it runs, or raise retries and timeout_s",
        api_key_env=config.api_key_env,
        sleep=sleep,
    )


def _text(answer: Any) -> str:
    try:
        content: Any = answer["choices"][0]["message"]["content"]
    except (LookupError, TypeError) as error:
        raise UselessAnswer(f"not a chat completion: {shown(str(answer))}") from error
    return content if isinstance(content, str) else ""
