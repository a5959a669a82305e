"""Answers in OpenAI's shapes, whole and in chunks, with ours beside: confidence, gate, lineage."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from gyrocompass.serve.answer import Answered, Judgement, Token
from gyrocompass.serve.backend import Scored

LEAST_LOGPROB = -9999.0
"""What OpenAI writes for a token that is as good as impossible; JSON has no infinity."""
_DIGITS = 7

_FINISH = {"stop": "stop", "length": "length", "cut": "length"}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Counts of tokens."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def doubts(judgement: Judgement | None) -> dict[str, Any]:
    """`confidence` and `gate` of a choice."""
    if judgement is None:
        return {}
    confidence = judgement.confidence
    found: dict[str, Any] = {
        "gate": {
            "decision": judgement.outcome,
            "reasons": list(judgement.reasons),
            "policy": judgement.policy or None,
            "flags": {name: round(score, _DIGITS) for name, score in judgement.flags.items()},
            "review_id": judgement.review_id,
        }
    }
    if confidence is not None:
        interval = None if confidence.low is None else [confidence.low, confidence.high]
        found["confidence"] = {
            "probability": confidence.probability,
            "interval": interval,
            "calibrator": confidence.calibrator,
        }
    return found


def finish_reason(answered: Answered, judgement: Judgement | None) -> str:
    """OpenAI's word for how it ended."""
    if judgement is not None and judgement.outcome in ("abstain", "review", "block"):
        return "content_filter"
    return _FINISH[answered.finish]


def shown_text(answered: Answered, judgement: Judgement | None) -> str:
    """What the user gets."""
    return answered.text if judgement is None or judgement.text is None else judgement.text


def chat_logprobs(tokens: Sequence[Token], alternatives: int) -> dict[str, Any]:
    """`choices[].logprobs` of a chat."""
    return {
        "content": [
            {
                **_chat_token(token.text, token.logprob),
                "top_logprobs": [_chat_token(*other) for other in token.alternatives[:alternatives]],
            }
            for token in tokens
        ],
        "refusal": None,
    }


def _chat_token(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "bytes": list(text.encode()), "logprob": number(logprob)}


def number(logprob: float) -> float:
    """A log-probability as JSON has it; the chosen one and the best one are rounded alike."""
    return LEAST_LOGPROB if not logprob > LEAST_LOGPROB else round(logprob, _DIGITS)


def completion_logprobs(
    scored: Scored | None, tokens: Sequence[Token], alternatives: int, start: int
) -> dict[str, Any]:
    """`choices[].logprobs` of a completion, the prompt's tokens before those written.

    Args:
        scored: the prompt's, for echo.
        tokens: those written.
        alternatives: how many are told in each place.
        start: where the written text begins, characters.
    """
    before = [] if scored is None else list(scored.tokens)
    offsets = [] if scored is None else list(scored.text_offset)
    for token in tokens:
        offsets.append(start)
        start += len(token.text)
    every = [*before, *tokens]
    values = [None if token.logprob != token.logprob else number(token.logprob) for token in every]
    tops: list[dict[str, float] | None] = [
        None if value is None else _best(token, alternatives)
        for token, value in zip(every, values, strict=True)
    ]
    return {
        "tokens": [token.text for token in every],
        "token_logprobs": values,
        "top_logprobs": tops,
        "text_offset": offsets,
    }


def _best(token: Token, alternatives: int) -> dict[str, float]:
    """Texts of different tokens may be equal: the likelier one is kept, which comes first."""
    found: dict[str, float] = {}
    for text, logprob in token.alternatives[:alternatives]:
        found.setdefault(text, number(logprob))
    return found


_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)


def split_calls(text: str, request_id: str, place: int) -> tuple[str | None, list[dict[str, Any]]]:
    """The text without the calls of tools in it, and those: what templates of the Hermes family write.

    >>> split_calls('<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>', "r", 0)[1][0]["function"]
    {'name': 'add', 'arguments': '{"a": 1}'}
    """
    calls: list[dict[str, Any]] = []

    def take(found: re.Match[str]) -> str:
        try:
            call = json.loads(found[1])
            name, arguments = call["name"], call.get("arguments", {})
        except (ValueError, KeyError, TypeError, AttributeError):
            return found[0]
        text = arguments if isinstance(arguments, str) else json.dumps(arguments)
        identity = f"call_{request_id[:16]}_{place}_{len(calls)}"
        calls.append({"id": identity, "type": "function", "function": {"name": str(name), "arguments": text}})
        return ""

    rest = _CALL.sub(take, text)
    return (rest.strip() or None, calls) if calls else (text, [])


def chat_choice(
    place: int,
    answered: Answered,
    judgement: Judgement | None,
    *,
    request_id: str,
    logprobs: bool,
    alternatives: int,
    tools: bool,
    extra: Mapping[str, Any],
) -> dict[str, Any]:
    """One of `choices` of a chat. Log-probabilities go with the answer's own text only, not with another."""
    text: str | None = shown_text(answered, judgement)
    replaced = judgement is not None and judgement.text is not None
    message: dict[str, Any] = {
        **({} if replaced else extra),
        "role": "assistant",
        "content": text,
        "refusal": None,
    }
    reason = finish_reason(answered, judgement)
    if tools and text:
        message["content"], calls = split_calls(text, request_id, place)
        if calls:
            message["tool_calls"], reason = calls, "tool_calls"
    elif message.get("tool_calls") and reason == "stop":
        message["content"], reason = text or None, "tool_calls"
    told = chat_logprobs(answered.tokens, alternatives) if logprobs and not replaced else None
    return {
        "index": place,
        "message": message,
        "logprobs": told,
        "finish_reason": reason,
        **cut(answered),
        **doubts(judgement),
    }


def cut(answered: Answered) -> dict[str, Any]:
    """Says of a partial answer that a deadline or a budget ended it."""
    return {"cut": True} if answered.finish == "cut" else {}
