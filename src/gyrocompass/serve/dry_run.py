"""What a policy would have done to logged traffic, next to what was done.

An event has numbers always, and texts only where they were kept (`--keep-texts`). A rule or a scorer that
looks at texts cannot be judged without them; such events are counted apart, never guessed. Scorers that ask a
server or a model are not asked again: what they said then stands in the event, by name.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from gyrocompass.measure.calibration_metrics import wilson
from gyrocompass.serve.answer import Answered, Asked, Confidence, Outcome, Token
from gyrocompass.serve.confidence import Calibrated
from gyrocompass.serve.gate import Facts, holds
from gyrocompass.serve.policy import Policy, Rule


class Share(NamedTuple):
    """How many answers had one outcome."""

    answers: int
    share: float
    low: float
    high: float
    """Wilson's 95% interval."""


class DryRun(NamedTuple):
    """What came of it."""

    judged: int
    unknown: int
    """Events that could not be judged: a rule needs what was not kept."""
    before: Mapping[str, Share]
    """By outcome, of those that were judged."""
    after: Mapping[str, Share]
    changed: Mapping[tuple[str, str], int]
    """By what was and what would have been, where these differ."""


class _NotKept(Exception):  # noqa: N818
    """A rule looks at what the event does not have."""


def dry_run(policy: Policy, events: Iterable[Mapping[str, Any]], calibrated: Calibrated | None) -> DryRun:
    """Judge events that ended with an answer.

    Args:
        policy: checked.
        events: as `events.read_events` gives them.
        calibrated: of the policy.
    """
    before: Counter[str] = Counter()
    after: Counter[str] = Counter()
    changed: Counter[tuple[str, str]] = Counter()
    unknown = 0
    for event in events:
        if event["status"] != 200:
            continue
        try:
            outcome = judge(policy, event, calibrated)
        except _NotKept:
            unknown += 1
            continue
        was = event["outcome"] or "answer"
        before[was] += 1
        after[outcome] += 1
        if was != outcome:
            changed[was, outcome] += 1
    total = sum(after.values())
    return DryRun(total, unknown, _shares(before, total), _shares(after, total), dict(changed))


def judge(policy: Policy, event: Mapping[str, Any], calibrated: Calibrated | None) -> Outcome:
    """What a policy does to one event."""
    facts = _facts(event, calibrated)
    for rule in policy.rules:
        _check_is_kept(rule, event, policy)
        if holds(rule.when, facts):
            return rule.then
    return policy.otherwise


def _facts(event: Mapping[str, Any], calibrated: Calibrated | None) -> Facts:
    asked = Asked(
        event["request_id"], event["kind"], event["prompt"] or " " * event["prompt_characters"], (),
        event["model"], event["user"], event["tier"], event["slice"], event["tokens"], None, event["at"],
    )  # fmt: skip
    # As many tokens as there were, with the mean and the least log-probability that they had.
    count, mean, least = event["tokens"], event["mean_logprob"], event["min_logprob"]
    tokens = [Token("", None, mean or 0.0, event["mean_entropy"], ())] * count
    if count > 1 and mean is not None and least is not None:
        rest = (count * mean - least) / (count - 1)
        tokens = [Token("", None, least, event["mean_entropy"], ())]
        tokens += [Token("", None, rest, event["mean_entropy"], ())] * (count - 1)
    answered = Answered(event["text"] or "", tokens, "stop", event["prompt_tokens"], 0, 0, 0, event["engine"])
    confidence: Confidence | None = None
    threshold = math.inf
    if calibrated is not None:
        confidence = calibrated.of(answered, event["slice"])
        if calibrated.guarantee is not None:
            threshold = calibrated.guarantee.threshold(event["slice"])
    return Facts(asked, answered, event["flags"], confidence, threshold, False)


def _check_is_kept(rule: Rule, event: Mapping[str, Any], policy: Policy) -> None:
    when = rule.when
    needs_prompt = when.prompt_matches is not None
    needs_text = when.answer_matches is not None or when.masked is not None
    if (needs_prompt and event["prompt"] is None) or (needs_text and event["text"] is None):
        raise _NotKept
    if when.max_tokens_above is not None or when.cut is not None:
        raise _NotKept
    if when.flag is not None:
        name = when.flag.partition(".")[2]
        if not any(flag.partition(".")[2] == name for flag in event["flags"]):
            raise _NotKept


def _shares(counts: Mapping[str, int], total: int) -> dict[str, Share]:
    found = {}
    for name, count in sorted(counts.items()):
        low, high = wilson(count, total)
        found[name] = Share(count, count / total, low, high)
    return found
