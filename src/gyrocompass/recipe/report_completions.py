"""The completions of a run, token by token, for the report."""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple

from gyrocompass.core.store import Store
from gyrocompass.recipe.record import RunRecord
from gyrocompass.recipe.report_format import figure, likelihood


class Piece(NamedTuple):
    """One written token."""

    text: str
    step: int
    """On the colour scale, 0 (likely) to 5."""
    title: str
    """Its numbers."""


class CompletionFacts(NamedTuple):
    """One completion."""

    prompt: str
    text: str
    """Without special tokens."""
    pieces: list[Piece]
    nats_per_token: float | None
    finish: str


class CompletionGroup(NamedTuple):
    """The completions of one stage."""

    stage: str
    model: str
    chat: bool
    completions: list[CompletionFacts]


def completion_groups(record: RunRecord, store: Store) -> list[CompletionGroup]:
    """The completions stages, in the order of the run."""
    groups = []
    for stage in record.stages:
        if stage.kind == "completions":
            artifact = store.open(stage.artifact, verify=False)
            rows = json.loads((artifact.path / "completions.json").read_text(encoding="utf-8"))
            chat = bool(artifact.manifest.recipe.get("chat"))
            groups.append(
                CompletionGroup(stage.name, stage.inputs["model"], chat, [_facts(**row) for row in rows])
            )
    return groups


def _facts(
    prompt: str,
    text: str,
    token_ids: list[int],
    tokens: list[str],
    logprobs: list[float],
    finish: str,
    **_: Any,
) -> CompletionFacts:
    pieces = [
        Piece(
            token,
            likelihood(logprob),
            f"{token!r} (id {token_id}): log p = {figure(logprob)} nats, p = {math.exp(logprob):.3g}",
        )
        for token, token_id, logprob in zip(tokens, token_ids, logprobs, strict=True)
    ]
    mean = -sum(logprobs) / len(logprobs) if logprobs else None
    return CompletionFacts(prompt, text, pieces, mean, finish)
