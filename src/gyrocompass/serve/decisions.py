"""Questions with a known set of answers: what a model's likelihoods say of each, calibrated.

    input + question --> a prompt that ends where a label comes --likelihoods--> log p of each label

    p(label) = exp(log p_label) / sum over labels of exp(log p_other)
    predicate    the calibrated p(yes)
    choice       the likeliest choice, p of each, confidence = the calibrated p of the likeliest
    score        sum over levels of level * p(level), levels counted from 0; confidence as for a choice

Labels are letters (of a predicate: yes, no), so that each is a token or nearly, whatever a choice is called.
The calibrator is one for choices; without one the probabilities are the model's own, and the answer says so.
A choice's other probabilities are scaled to what the calibrated one leaves.
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Sequence
from typing import Any

from gyrocompass.serve.answer import Confidence
from gyrocompass.serve.wire import Choice, Predicate, Question, Score

Calibrate = Callable[[float], Confidence]
"""From the model's own probability of its choice to the calibrated one."""

_DIGITS = 7


def labels_of(question: Question) -> list[str]:
    """What the model is to say, in the order of the answers.

    >>> labels_of(Predicate(type="predicate", instructions="It rains."))
    ['yes', 'no']
    """
    if isinstance(question, Predicate):
        return ["yes", "no"]
    count = len(question.choices if isinstance(question, Choice) else question.levels)
    letters = string.ascii_uppercase
    if count <= len(letters):
        return list(letters[:count])
    return [f"{letters[place // 26]}{letters[place % 26]}" for place in range(count)]


def prompt_of(text: str, question: Question) -> str:
    """What the model reads, up to where a label comes."""
    if isinstance(question, Predicate):
        return f"{text}\n\nIs this true of the text above? Answer yes or no.\n{question.asked()}\nAnswer:"
    options = (
        [(str(option.value), option.description) for option in question.choices]
        if isinstance(question, Choice)
        else [(level.label, level.description) for level in question.levels]
    )
    lines = [
        f"{label}. {name}{': ' if about else ''}{about}"
        for label, (name, about) in zip(labels_of(question), options, strict=True)
    ]
    return "\n".join([f"{text}\n", question.asked(), *lines, "Answer with the letter.", "Answer:"])


def answer_of(
    question: Question, logprobs: Sequence[float], calibrate: Calibrate | None
) -> tuple[dict[str, Any], Confidence | None]:
    """The answer as it is sent, and its confidence.

    Args:
        question: what was asked.
        logprobs: log p of each label, nats.
        calibrate: for the probability of the likeliest; None: it stays as it is.
    """
    most = max(logprobs)
    if not math.isfinite(most):
        return {"type": "refusal", "name": question.name}, None
    weights = [math.exp(value - most) for value in logprobs]
    shares = [weight / sum(weights) for weight in weights]
    best = max(range(len(shares)), key=shares.__getitem__)
    confidence = None if calibrate is None else calibrate(shares[best])
    if confidence is not None:
        shares = _with(shares, best, confidence.probability)
    rounded = [round(share, _DIGITS) for share in shares]
    found: dict[str, Any] = {"type": question.type, "name": question.name}
    if isinstance(question, Predicate):
        return found | {"probability": rounded[0]}, confidence
    found["confidence"] = rounded[best]
    if isinstance(question, Choice):
        values = [option.value for option in question.choices]
        found["choice"] = values[best]
        found["probabilities"] = [
            {"value": value, "probability": share} for value, share in zip(values, rounded, strict=True)
        ]
        return found, confidence
    assert isinstance(question, Score)
    found["score"] = round(sum(place * share for place, share in enumerate(shares)), _DIGITS)
    found["probabilities"] = [
        {"label": level.label, "value": place, "probability": share}
        for place, (level, share) in enumerate(zip(question.levels, rounded, strict=True))
    ]
    return found, confidence


def _with(shares: Sequence[float], place: int, probability: float) -> list[float]:
    """One of them set, the others in their proportions.

    >>> _with([0.5, 0.25, 0.25], 0, 0.75)
    [0.75, 0.125, 0.125]
    """
    rest = sum(share for number, share in enumerate(shares) if number != place)
    scale = (1 - probability) / rest if rest > 0 else 0.0
    even = (1 - probability) / max(1, len(shares) - 1)
    found = [share * scale if rest > 0 else even for share in shares]
    found[place] = probability
    return found
