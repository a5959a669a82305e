"""Which slices a training no longer helps, what to do about each, and which documents weigh most.

    evaluations of a training, its ledger, a ledger of held-out documents --suggestions--> Suggestion, ...

Of a slice's held-out losses v_1 ... v_n (nats per token, at n >= 3 evaluations), with m the least of them,

    rises        v_n >= (1 + TOLERANCE) m
    stands       (v_h - v_n) < TOLERANCE v_h over the last half, h = n // 2, and it does not rise

A slice that rises while its training loss falls is learned by heart: it needs more data, or fewer passes.
One that stands still needs more data if it has few of the tokens, cleaning if few documents hold much of its
loss, else a fine-tune of its own. Documents weigh by their summed loss above their slice's mean; these are
held-out ones, since what a training reads is not scored document by document. These are rules of thumb with
their figures beside them; nobody promises that the advice helps.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gyrocompass.core.artifact import Artifact
from gyrocompass.measure.ledger import FIELDS, Ledger

TOLERANCE = 0.005
"""Of a loss: what counts as no change."""
FEW_TOKENS = 0.5
"""Of an equal share."""
HEAVY = 0.3
"""Of a slice's excess loss in its five heaviest documents."""
LEAST_DOCUMENTS = 20
"""Held out in a slice, below which nothing is said of how its loss is spread."""
_SHOWN = 3


class Suggestion(NamedTuple):
    """What to do about a slice."""

    slice: str
    state: str
    """rises or stands still."""
    advice: str
    """more data, cleaning, or a fine-tune."""
    why: str
    documents: tuple[str, ...]
    """The heaviest of those that were held out."""


def suggestions(trained: Artifact, scored: Ledger | None = None) -> list[Suggestion]:
    """What to do about slices.

    Args:
        trained: of a training stage; nothing is suggested where it was not evaluated while it learned.
        scored: held-out documents under the model; None: no documents are named.
    """
    path = trained.path / "evaluations.jsonl"
    ledger_path = trained.path / "ledger.parquet"
    if not path.is_file() or not ledger_path.is_file():
        return []
    losses: dict[str, list[float]] = defaultdict(list)
    for line in path.read_text(encoding="utf-8").splitlines():
        for name, value in json.loads(line)["nll_nats"].items():
            losses[name].append(float(value))
    return [*_suggested(losses, Ledger.load(ledger_path), scored)]


def _suggested(
    losses: Mapping[str, Sequence[float]], ledger: Ledger, scored: Ledger | None
) -> Iterator[Suggestion]:
    slices = dict(ledger.items("slice"))
    tokens = sum(sums.count for sums in slices.values())
    for name, values in losses.items():
        state = _state(values)
        if state is None:
            continue
        sums = slices.get(name)
        heavy, excess = ((), 0.0) if scored is None else _heavy(scored, name)
        share = 0.0 if sums is None or not tokens else sums.count / tokens
        told = f"{values[len(values) // 2]:.3f}, then {values[-1]:.3f} nats per token held out"
        if state == "rises":
            advice, why = "more data", f"{told}; the least was {min(values):.3f}: it is learned by heart"
        elif share < FEW_TOKENS / max(1, len(losses)):
            advice, why = "more data", f"{told}; it has {share:.1%} of the tokens"
        elif excess > HEAVY:
            advice, why = "cleaning", f"{told}; five documents hold {excess:.0%} of its excess loss"
        else:
            advice, why = "a fine-tune", f"{told}; it has {share:.1%} of the tokens"
        yield Suggestion(name, state, advice, why, heavy)


def _state(values: Sequence[float]) -> str | None:
    if len(values) < 3:
        return None
    if values[-1] >= (1 + TOLERANCE) * min(values):
        return "rises"
    half = values[len(values) // 2]
    return "stands still" if half - values[-1] < TOLERANCE * half else None


def _heavy(ledger: Ledger, name: str) -> tuple[tuple[str, ...], float]:
    """The heaviest documents of a slice, and the five heaviest's share of all excess loss."""
    documents, sums_RF = ledger.columns("document", name)
    value_R, count_R = sums_RF[:, FIELDS.index("value")], sums_RF[:, FIELDS.index("count")]
    if not count_R.sum():
        return (), 0.0
    excess_R = value_R - count_R * value_R.sum() / count_R.sum()
    order = np.argsort(-excess_R, kind="stable")
    above = float(excess_R[excess_R > 0].sum())
    enough = above > 0 and len(documents) >= LEAST_DOCUMENTS
    share = float(np.maximum(excess_R[order[:5]], 0).sum()) / above if enough else 0.0
    return tuple(documents[row] for row in order[:_SHOWN]), share


def as_rows(found: Sequence[Suggestion]) -> list[dict[str, Any]]:
    """As JSON."""
    return [one._asdict() | {"documents": list(one.documents)} for one in found]
