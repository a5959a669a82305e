"""Safety scorers: a text to a score from 0 to 1, or a failure that is told and not passed over.

    Score = async text -> float

Each is made from its part of a policy. What raises, is too slow, or says NaN has failed; what then happens
the policy says (`on_failure`), and by default nothing passes that could not be looked at.
"""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple

from gyrocompass.core.errors import BadInput
from gyrocompass.serve.policy import (
    ClassifierScorer,
    ModerationScorer,
    OnFailure,
    OwnScorer,
    PatternScorer,
    Policy,
    Scorer,
    pattern_of,
)

Score = Callable[[str], Awaitable[float]]
LONGEST_CHARACTERS = 200_000
"""A longer text is not looked at by patterns in full: that is a failure."""


class Looker(NamedTuple):
    """A scorer at work."""

    name: str
    sides: tuple[str, ...]
    timeout_s: float | None
    on_failure: OnFailure
    score: Score
    close: Callable[[], Awaitable[None]] | None = None
    """Lets go of what it holds."""


class Looked(NamedTuple):
    """What all scorers said of one side."""

    flags: Mapping[str, float]
    """By side and name."""
    failures: tuple[tuple[str, OnFailure], ...]
    """What failed, in words, and what the policy does then."""


def of_side(lookers: tuple[Looker, ...], side: str) -> tuple[Looker, ...]:
    """Those that look at questions, or at answers."""
    return tuple(looker for looker in lookers if side in looker.sides)


async def look(lookers: tuple[Looker, ...], side: str, text: str) -> Looked:
    """Ask all scorers of a side at once. Raises nothing."""
    if any(looker.timeout_s is not None for looker in lookers):
        found = await asyncio.gather(*(_one(looker, text) for looker in lookers))
    else:  # nobody waits for anything
        found = [await _one(looker, text) for looker in lookers]
    flags, failures = {}, []
    for looker, score in zip(lookers, found, strict=True):
        if isinstance(score, str):
            failures.append((f"{looker.name} failed on the {side}: {score}", looker.on_failure))
        else:
            flags[f"{side}.{looker.name}"] = score
    return Looked(flags, tuple(failures))


async def _one(looker: Looker, text: str) -> float | str:
    """The score, or why there is none."""
    try:
        if looker.timeout_s is None:
            score = float(await looker.score(text))
        else:
            async with asyncio.timeout(looker.timeout_s):
                score = float(await looker.score(text))
    except TimeoutError:
        return f"no answer within {looker.timeout_s:g} s"
    except Exception as error:  # whatever a scorer raises, it has not looked
        return f"{type(error).__name__}: {error}"[:300]
    return score if 0 <= score <= 1 else f"it says {score}"


def lookers_of(
    policy: Policy,
    *,
    own: Callable[[str, str], Awaitable[float]] | None = None,
    classifier: Callable[[str], Callable[[str], float]] | None = None,
) -> tuple[Looker, ...]:
    """The scorers of a policy.

    Args:
        policy: checked.
        own: P(statement) of a text by the served model, for scorers of the kind `own`.
        classifier: opens a model with a scalar head, for scorers of the kind `classifier`.

    Raises:
        BadInput: one of them cannot work here.
    """
    return tuple(_looker(scorer, own, classifier) for scorer in policy.scorers)


def _looker(
    scorer: Scorer,
    own: Callable[[str, str], Awaitable[float]] | None,
    classifier: Callable[[str], Callable[[str], float]] | None,
) -> Looker:
    timeout_s: float | None = None
    close: Callable[[], Awaitable[None]] | None = None
    if isinstance(scorer, PatternScorer):
        score = _patterns(scorer)
    elif isinstance(scorer, ModerationScorer):
        (score, close), timeout_s = _moderation(scorer), scorer.timeout_s
    elif isinstance(scorer, ClassifierScorer):
        if classifier is None:
            raise BadInput(f"the scorer {scorer.name} needs a model, which cannot be opened here")
        score, timeout_s = _classifier(classifier(scorer.model)), scorer.timeout_s
    else:
        score, timeout_s = _own(scorer, own), scorer.timeout_s
    return Looker(scorer.name, scorer.sides, timeout_s, scorer.on_failure, score, close)


def _patterns(scorer: PatternScorer) -> Score:
    deny = [pattern_of(pattern) for pattern in scorer.deny]
    allow = [pattern_of(pattern) for pattern in scorer.allow]

    async def score(text: str) -> float:
        if len(text) > LONGEST_CHARACTERS:
            raise ValueError(f"a text of {len(text)} characters is longer than {LONGEST_CHARACTERS}")
        let_be = [match.span() for pattern in allow for match in pattern.finditer(text)]
        for pattern in deny:
            for match in pattern.finditer(text):
                start, end = match.span()
                if not any(first <= start and end <= last for first, last in let_be):
                    return 1.0
        return 0.0

    return score


def _moderation(scorer: ModerationScorer) -> tuple[Score, Callable[[], Awaitable[None]]]:
    headers = {}
    if scorer.api_key_env is not None:
        name = scorer.api_key_env
        if name not in os.environ:
            raise BadInput(
                f"the environment variable {name} is not set; it holds the key of {scorer.name}",
                fix=f"export {name}=...",
            )
        headers["Authorization"] = f"Bearer {os.environ[name]}"
    client: list[Any] = []

    async def score(text: str) -> float:
        import httpx

        if not client:
            client.append(httpx.AsyncClient(headers=headers, timeout=scorer.timeout_s))
        body = {"input": text, **({"model": scorer.model} if scorer.model else {})}
        response = await client[0].post(scorer.url, json=body)
        response.raise_for_status()
        scores: Mapping[str, float] = response.json()["results"][0]["category_scores"]
        kept = [
            float(value)
            for name, value in scores.items()
            if not scorer.categories or name in scorer.categories
        ]
        return max(kept) if kept else math.nan

    async def close() -> None:
        if client:
            await client.pop().aclose()

    return score, close


def _classifier(classify: Callable[[str], float]) -> Score:
    async def score(text: str) -> float:
        return await asyncio.to_thread(classify, text)

    return score


def _own(scorer: OwnScorer, own: Callable[[str, str], Awaitable[float]] | None) -> Score:
    if own is None:
        raise BadInput(f"the scorer {scorer.name} asks the served model, and there is none")

    async def score(text: str) -> float:
        return await own(text, scorer.statement)

    return score
