"""A run's rewards, read from YAML.

rewards:
  - exact_match: {field: solution}                  # weight 1
  - parses: {weight: 0.2}
  - length: {target: 200, slack: 100, weight: 0.1, name: brevity}

[entry, ...] --parse_rewards--> WeightedSum
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import create_model

from gyrocompass.core.config import Config, parse
from gyrocompass.core.errors import ConfigError, did_you_mean
from gyrocompass.measure.reward import Part, Sample, WeightedSum
from gyrocompass.measure.rewards import answers as answers  # these register themselves
from gyrocompass.measure.rewards import code as code
from gyrocompass.measure.rewards import judged as judged
from gyrocompass.measure.rewards import text as text
from gyrocompass.measure.rewards.registry import REWARDS, Registered, Tools


@dataclass(frozen=True)
class Named:
    """A registered reward with its parameters bound."""

    name: str
    registered: Registered
    parameters: Mapping[str, Any]
    tools: Tools

    @property
    def low(self) -> float:
        """The least it can say."""
        return self.registered.limits(**self.parameters)[0]

    @property
    def high(self) -> float:
        """The most it can say."""
        return self.registered.limits(**self.parameters)[1]

    @property
    def settings(self) -> dict[str, Any]:
        """Which reward it is and its parameters, as JSON."""
        parameters = self.registered.parameters.model_validate(dict(self.parameters))
        return {"reward": self.registered.name, **parameters.model_dump(mode="json")}

    def __call__(self, samples: Sequence[Sample], /) -> list[float]:
        """One number for each sample."""
        return self.registered.function(samples, self.tools, **self.parameters)


def parse_rewards(
    entries: Sequence[str | Mapping[str, Any]], tools: Tools | None = None, where: str = "rewards"
) -> WeightedSum:
    """Read a YAML list of rewards.

    Args:
        entries: each a name, or {name: {its parameters, weight, name}}; `name` is what reports call it.
        tools: what the rewards need beside the samples.
        where: what errors name as the place.

    >>> sum_of = parse_rewards(["parses", {"length": {"target": 9, "weight": 0.5}}])
    >>> [part.reward.name for part in sum_of.parts], sum_of.low, sum_of.high
    (['parses', 'length'], 0.0, 1.5)

    Raises:
        ConfigError: an unknown reward or parameter (the nearest known one is named), a parameter out of
            bounds, a name used twice, an empty list.
    """
    if isinstance(entries, str | Mapping) or not entries:
        raise ConfigError("rewards are a list with at least one entry", where=where, fix="- parses")
    tools = tools or Tools()
    parts = [_part(entry, tools, f"{where}.{index}") for index, entry in enumerate(entries)]
    names = [part.reward.name for part in parts]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f"two rewards are called {name}", where=where, fix=f"- {name}: {{name: another, ...}}"
            )
    return WeightedSum(tuple(parts))


def reward_models(entries: Sequence[str | Mapping[str, Any]]) -> dict[str, str]:
    """The reward models that a list of rewards names, each by the path of its key.

    >>> reward_models(["parses", {"reward_model": {"model": "helpful", "low": -5, "high": 5}}])
    {'1.reward_model.model': 'helpful'}
    """
    found = {}
    for index, entry in enumerate(entries):
        given = entry.get("reward_model") if isinstance(entry, Mapping) else None
        if isinstance(given, Mapping) and isinstance(given.get("model"), str):
            found[f"{index}.reward_model.model"] = given["model"]
    return found


def _part(entry: str | Mapping[str, Any], tools: Tools, where: str) -> Part:
    """One entry, checked against the signature of its reward."""
    if isinstance(entry, str):
        entry = {entry: None}
    if not isinstance(entry, Mapping) or len(entry) != 1:
        raise ConfigError(
            f"an entry is one reward's name, or {{name: {{...}}}}; found {entry!r}", where=where
        )
    ((name, given),) = entry.items()
    if name not in REWARDS:
        raise ConfigError(f"unknown reward {name!r}{did_you_mean(str(name), REWARDS)}", where=where)
    registered = REWARDS[name]
    keys = dict(parse(_entry_model(registered), {} if given is None else given, f"{where}.{name}"))
    weight, called = keys.pop("weight"), keys.pop("name")
    low, high = registered.limits(**keys)
    if not low < high:
        raise ConfigError(f"the range of {name} is empty: [{low}, {high}]", where=f"{where}.{name}")
    return Part(Named(called, registered, keys, tools), weight)


@cache
def _entry_model(registered: Registered) -> type[Config]:
    """What an entry of this reward may hold: its parameters, a weight and a name."""
    shared: dict[str, Any] = {"weight": (float, 1.0), "name": (str, registered.name)}
    return create_model(f"{registered.name}_entry", __base__=registered.parameters, **shared)
