"""The guard: no step is taken on a NaN or on a loss spike, and the documents of that step are named.

Before each optimizer step the guard compares the step's mean loss, in total and per slice, with its recent
past by a robust z-score,

    z = (x - median) / max(1.4826 * MAD, floor * |median|) * sqrt(min(1, n / median n)),

where n is how many tokens the mean stands on: a slice with three tokens in a step may be wild without being
wrong. What trips the guard never enters its history. The last two factors keep a flat loss and a thin slice
from raising alarms.

Left out: the decision what to do, which is the loop's (`GuardConfig.policy`), and slow drifts.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from pydantic import Field

from gyrocompass.core.config import Config

TOTAL = "total"
RELATIVE_FLOOR = 0.01


class GuardConfig(Config):
    """When the guard trips, and what follows.

    stop: the run ends with the documents named. rewind: the last checkpoint is loaded, the offending data
    window is passed over, and the run goes on; more than `max_rewinds` of them end it all the same.
    """

    policy: Literal["stop", "rewind"] = "rewind"
    spike_z: float | None = Field(default=10.0, gt=0)
    history_steps: int = Field(default=50, ge=2)
    min_history_steps: int = Field(default=10, ge=2)
    max_rewinds: int = Field(default=3, ge=0)


class Mean(NamedTuple):
    """A mean and how many tokens it stands on."""

    nats: float
    tokens: int


class Verdict(NamedTuple):
    """Why a step must not be taken."""

    reason: str
    slice: str
    nats: float
    z: float | None

    def __str__(self) -> str:
        place = "the total" if self.slice == TOTAL else f"slice {self.slice}"
        if self.z is None:
            return f"{self.reason} in {place}"
        return f"{self.reason} in {place}: {self.nats:.4g} nats per token, robust z = {self.z:.1f}"


class Guard:
    """Judges each step by the steps before it; its whole state is the recent means."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self._history: dict[str, deque[Mean]] = {}

    def judge(self, means: Mapping[str, Mean], gradient_norm: float) -> Verdict | None:
        """The verdict on a step, or None; a step without one is remembered.

        `means` has one entry per slice and one named `total`.
        """
        verdict = self._non_finite(means, gradient_norm) or self._spike(means)
        if verdict is None:
            for name, mean in means.items():
                history = self._history.setdefault(name, deque(maxlen=self.config.history_steps))
                history.append(mean)
        return verdict

    def _non_finite(self, means: Mapping[str, Mean], gradient_norm: float) -> Verdict | None:
        for name, mean in means.items():
            if not math.isfinite(mean.nats):
                return Verdict("a loss that is not finite", name, mean.nats, None)
        if not math.isfinite(gradient_norm):
            return Verdict("a gradient that is not finite", TOTAL, gradient_norm, None)
        return None

    def _spike(self, means: Mapping[str, Mean]) -> Verdict | None:
        if self.config.spike_z is None:
            return None
        for name, mean in means.items():
            history = self._history.get(name, ())
            if mean.tokens and len(history) >= self.config.min_history_steps:
                z = robust_z(mean, list(history))
                if z > self.config.spike_z:
                    return Verdict("a loss spike", name, mean.nats, z)
        return None

    def state(self) -> dict[str, Any]:
        """The recent means, as JSON."""
        return {name: [list(mean) for mean in history] for name, history in self._history.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned."""
        length = self.config.history_steps
        self._history = {name: deque((Mean(*mean) for mean in rows), length) for name, rows in state.items()}


def robust_z(mean: Mean, history: list[Mean]) -> float:
    """How many robust standard deviations `mean` lies above its history (formula in the module docstring).

    >>> history = [Mean(2.0, 100), Mean(2.1, 100), Mean(1.9, 100), Mean(2.0, 100), Mean(2.2, 100)]
    >>> round(robust_z(Mean(3.0, 100), history), 1), round(robust_z(Mean(3.0, 1), history), 1)
    (6.7, 0.7)
    """
    median = statistics.median(past.nats for past in history)
    spread = 1.4826 * statistics.median(abs(past.nats - median) for past in history)
    spread = max(spread, RELATIVE_FLOOR * abs(median), 1e-12)
    support = min(1.0, mean.tokens / max(1, statistics.median(past.tokens for past in history)))
    return (mean.nats - median) / spread * math.sqrt(support)
