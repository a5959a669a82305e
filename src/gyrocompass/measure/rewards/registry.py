"""The names of rewards: a decorated function can be asked for in YAML, by its own name.

    @reward()
    def exact_match(samples, tools, *, field: str = "answer") -> list[float]: ...

    - exact_match: {field: solution}

The keyword parameters of the function are the keys of the YAML entry, with the types, bounds and defaults of
its signature. `weight` and `name` belong to the entry. What a reward needs of the machine or of the run (a
sandbox, a reward model) comes in `Tools`.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, TypeVar

from pydantic import create_model

from gyrocompass.core.config import Config
from gyrocompass.measure.reward import Sample
from gyrocompass.measure.sandbox.run import SandboxConfig, sandbox_abilities

Scorer = Callable[[Sequence[Sample]], Sequence[float]]
"""Samples to numbers, prompt and completion together: a reward model, without the model."""


@dataclass(frozen=True)
class Tools:
    """What rewards are given beside the samples."""

    sandbox: SandboxConfig = field(default_factory=SandboxConfig)
    scorers: Mapping[str, Scorer] = field(default_factory=dict)
    """Reward models by name."""
    sleep: Callable[[float], None] = time.sleep
    """Waits between attempts."""


F = TypeVar("F", bound=Callable[..., list[float]])


@dataclass(frozen=True)
class Registered:
    """A reward by name: what computes it, what it may be told, and its range."""

    name: str
    function: Callable[..., list[float]]
    """(samples, tools, **parameters) -> values."""
    parameters: type[Config]
    limits: Callable[..., tuple[float, float]]
    """(**parameters) -> (low, high)."""
    needs: str | None = None
    """A package that not everybody has, or the sandbox."""

    def why_not(self) -> str | None:
        """Why it cannot be computed on this machine; None where it can."""
        if self.needs == SANDBOX:
            missing = sorted(sandbox_abilities().missing)
            return f"no sandbox here would guard {', '.join(missing)}" if missing else None
        if self.needs is not None and find_spec(self.needs) is None:
            return f"{self.needs} is not installed: pip install 'gyrocompass[rewards]'"
        return None


REWARDS: dict[str, Registered] = {}
SANDBOX = "sandbox"


def zero_to_one(**_: Any) -> tuple[float, float]:
    """The range of most rewards."""
    return 0.0, 1.0


def reward(
    limits: Callable[..., tuple[float, float]] = zero_to_one, needs: str | None = None
) -> Callable[[F], F]:
    """Register a function under its own name; it stays callable as it is.

    Args:
        limits: the range it states; takes the same parameters.
        needs: a package of the extra `rewards`, or `SANDBOX`, without which it cannot be computed.
    """

    def register(function: F) -> F:
        name = function.__name__
        assert name not in REWARDS, f"two rewards are called {name}"
        fields: dict[str, Any] = {
            key: (parameter.annotation, ... if parameter.default is parameter.empty else parameter.default)
            for key, parameter in inspect.signature(function, eval_str=True).parameters.items()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        }
        assert not {"weight", "name"} & set(fields), f"{name}: the keys weight and name belong to the entry"
        model = create_model(f"{name}_parameters", __base__=Config, **fields)
        REWARDS[name] = Registered(name, function, model, limits, needs)
        return function

    return register
