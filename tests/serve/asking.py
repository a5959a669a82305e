"""Questions and answers for tests of what stands behind the routes."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from gyrocompass.serve.answer import Answered, Asked, Token

T = TypeVar("T")


def done(coroutine: Coroutine[Any, Any, T]) -> T:
    """What a coroutine gives, whatever loop runs in this thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, coroutine).result()


def asked(prompt: str = "What is two and two?", **changes: Any) -> Asked:
    one = Asked(
        id=uuid.uuid4().hex,
        kind="chat",
        prompt=f"user: {prompt}",
        messages=[{"role": "user", "content": prompt}],
        model="model-1",
        user="u",
        tier="",
        slice="sums",
        max_tokens=10,
        deadline_s=None,
        received_at=time.time(),
        consent=True,
    )
    return one._replace(**changes)


def answered(
    text: str = "four", logprob: float = -0.1, entropy: float | None = 0.2, **changes: Any
) -> Answered:
    tokens = [Token(word, 1, logprob, entropy, [(word, logprob), ("no", -3.0)]) for word in text.split()]
    one = Answered(text, tokens, "stop", 7, 0.0, 0.01, 0.02, "embedded")
    return one._replace(**changes)
