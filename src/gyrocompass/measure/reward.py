"""What a reward is: a named number for each sample, inside a range it has stated.

    samples --Reward----> one float each, low <= r <= high
    samples --checked---> the same, or an error that names the reward, the sample and the value
    rewards --WeightedSum--> a reward: sum of weight * part, with every part kept apart for the log

A reward that leaves its range or is NaN would be learned from before anyone saw it, so it ends the run.
Left out: advantages, which are the trainer's, and any scaling of a part by what the run measures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from gyrocompass.core.errors import BadInput, GyroError


@dataclass(frozen=True)
class Sample:
    """One completion and what it is judged by."""

    prompt: str
    completion: str
    reference: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """The fields of the record the prompt came from: answer, tests, schema."""
    n_tokens: int = 0
    """Tokens of the completion."""
    prompt_ids: Sequence[int] = ()
    """The prompt as the model read it, for rewards that read tokens."""
    token_ids: Sequence[int] = ()
    """The completion as the model wrote it, with the token that ended it."""
    finished: bool = True
    """Whether it ended by itself, rather than at the token limit."""

    def needed(self, name: str, reward: str) -> Any:
        """A field of the reference.

        Raises:
            BadInput: the record has no such field.
        """
        if name not in self.reference:
            known = ", ".join(map(str, self.reference)) or "none"
            raise BadInput(
                f"the reward {reward} needs the field {name!r} of each record; this one has: {known}",
                where=f"prompt {shortened(self.prompt)!r}",
                fix="add the field to the data, or name another in the reward's entry",
            )
        return self.reference[name]


class Reward(Protocol):
    """Judges samples; called with a whole batch, so that it can work on many at once."""

    @property
    def name(self) -> str:
        """What reports call it."""

    @property
    def low(self) -> float:
        """The least it can say."""

    @property
    def high(self) -> float:
        """The most it can say."""

    def __call__(self, samples: Sequence[Sample], /) -> list[float]:
        """One number for each sample, in their order."""


def checked(reward: Reward, samples: Sequence[Sample]) -> list[float]:
    """The rewards of samples, each inside the stated range.

    Raises:
        GyroError: a NaN, a value out of range, or another number of values than of samples.
    """
    values = reward(samples)
    if len(values) != len(samples):
        raise GyroError(f"the reward {reward.name} gave {len(values)} values for {len(samples)} samples")
    for index, (value, sample) in enumerate(zip(values, samples, strict=True)):
        if not reward.low <= value <= reward.high:  # a NaN is in no range
            raise GyroError(
                f"the reward {reward.name} is {value} for sample {index}, outside its range "
                f"[{reward.low}, {reward.high}]",
                where=f"prompt {shortened(sample.prompt)!r}, completion {shortened(sample.completion)!r}",
                fix="state the range it has, or mend the reward",
            )
    return values


class Part(NamedTuple):
    """A reward in a sum, and its weight."""

    reward: Reward
    weight: float = 1.0


class Scored(NamedTuple):
    """A weighted sum and what it is made of."""

    total: list[float]
    parts: dict[str, list[float]]
    """By the name of the part, before its weight."""


@dataclass(frozen=True)
class WeightedSum:
    """Rewards together, r = sum_k weight_k * r_k; its range follows from theirs."""

    parts: tuple[Part, ...]
    name: str = "reward"

    @property
    def low(self) -> float:
        """The least sum that the ranges of the parts allow."""
        return sum(min(w * part.low, w * part.high) for part, w in self.parts)

    @property
    def high(self) -> float:
        """The largest sum that the ranges of the parts allow."""
        return sum(max(w * part.low, w * part.high) for part, w in self.parts)

    def described(self) -> list[dict[str, Any]]:
        """Each part as JSON: its name, weight and range, and what it was told if it says so (`settings`)."""
        return [
            {
                "name": part.name,
                "weight": weight,
                "range": [part.low, part.high],
                "settings": getattr(part, "settings", None),
            }
            for part, weight in self.parts
        ]

    def scored(self, samples: Sequence[Sample]) -> Scored:
        """The sum and each of its parts, checked.

        Raises:
            GyroError: a part leaves its range.
        """
        parts = {part.name: checked(part, samples) for part, _ in self.parts}
        assert len(parts) == len(self.parts), "two rewards of one name"
        weights = [weight for _, weight in self.parts]
        total = [
            sum(weight * value for weight, value in zip(weights, values, strict=True))
            for values in zip(*parts.values(), strict=True)
        ]
        return Scored(total, parts)

    def __call__(self, samples: Sequence[Sample], /) -> list[float]:
        """The sum alone."""
        return self.scored(samples).total


def shortened(text: str, most: int = 60) -> str:
    """The beginning of a text, for a message.

    >>> shortened("abcdef", 4)
    'abc…'
    """
    return text if len(text) <= most else text[: most - 1] + "…"
