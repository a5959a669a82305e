"""Controllers: factors of objectives, or of slices, that follow what a run measures.

    factors() -> {name: factor}         constants of one window, known before its first forward pass
    observe(step, Observed)             what the window measured, summed over micro-batches and ranks

`blend.py` makes weights of the factors. The losses L_k that a controller reads are means without any weight.
Since every rank observes the same sums, all take the same decision, and since the factors of a window are
constants, its loss stays a sum over tokens (law 1). The state is plain JSON and stands in every checkpoint
(law 4).

Left out: weights that the model's own optimizer learns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from gyrocompass.core.config import Config
from gyrocompass.core.errors import BadInput

Factors = dict[str, float]

LEAST_FACTOR = 1e-3
"""GradNorm lets no objective fall below this factor before it renormalises."""


class Observed(NamedTuple):
    """What one window measured, over all ranks."""

    means: Mapping[str, float]
    """Each objective's mean, where the window had any of its weight."""
    gradient_norms: Mapping[str, float]
    """Each objective's, at the final hidden states; empty where they were not asked for."""
    excess: Mapping[str, float]
    """By slice, max(0, NLL - the reference's NLL) of the counted tokens in the mean; empty without DoReMi."""


class Controller(Protocol):
    """Decides factors from what it has observed; its whole state is a few numbers."""

    def factors(self) -> Factors:
        """Of the objectives it adapts."""

    def observe(self, step: int, seen: Observed) -> None:
        """Take what the window of a step measured, steps counted from 0."""

    def state(self) -> dict[str, Any]:
        """Everything remembered, as JSON."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned."""


# --- the controllers ---


class UncertaintyConfig(Config):
    """Homoscedastic uncertainty: see `Uncertainty`.

    Args:
        objectives: those to weigh; None: all. Leave out small regularisers: their weight would rise.
        rate: of the gradient steps on the log-variances.
        initial: every log-variance at the start.
        limit: the largest log-variance, of either sign.
    """

    objectives: tuple[str, ...] | None = None
    rate: PositiveFloat = 0.01
    initial: float = 0.0
    limit: PositiveFloat = 8.0


class Uncertainty:
    """Each objective is weighted by the inverse of a variance that is learned with it.

        sum_k exp(-s_k) L_k + s_k / 2         factor_k = exp(-s_k)
        s_k <- s_k - rate * (1/2 - exp(-s_k) L_k)

    This is the published form for likelihoods (classification); that for squared errors has exp(-s_k) / 2,
    which only moves s_k by log 2. At rest the factor is 1 / (2 L_k). The step is plain gradient descent.

    Raises:
        BadInput: a loss is negative, for which no variance is best.

    Source: Kendall, Gal and Cipolla 2018, arXiv:1705.07115, equations 7 to 10.
    """

    def __init__(self, config: UncertaintyConfig, names: Sequence[str]) -> None:
        self.config = config
        self.log_variance = dict.fromkeys(names, config.initial)

    def factors(self) -> Factors:
        """See `Controller`."""
        return {name: math.exp(-s) for name, s in self.log_variance.items()}

    def observe(self, step: int, seen: Observed) -> None:
        """See `Controller`."""
        for name, s in self.log_variance.items():
            if name not in seen.means:
                continue
            loss = _not_negative(name, seen.means[name], "uncertainty")
            s -= self.config.rate * (0.5 - math.exp(-s) * loss)
            self.log_variance[name] = max(-self.config.limit, min(self.config.limit, s))

    def state(self) -> dict[str, Any]:
        """See `Controller`."""
        return {"log_variance": dict(self.log_variance)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `Controller`."""
        self.log_variance = dict(state["log_variance"])


class GradNormConfig(Config):
    """Balance of gradient norms: see `GradNorm`.

    Args:
        objectives: those to balance; None: all.
        alpha: how strongly objectives that lag behind are pulled; 0: all norms equal.
        every_steps: norms are measured, and factors moved, every so many steps.
        rate: of the factors.
    """

    objectives: tuple[str, ...] | None = None
    alpha: NonNegativeFloat = 1.5
    every_steps: PositiveInt = 10
    rate: PositiveFloat = 0.025


class GradNorm:
    """Objectives train at similar rates: each gradient's norm is drawn to a common, loss-dependent size.

        G_k = f_k g_k      g_k = |d L_k / d h|      target_k = mean_j G_j * (r_k / mean_j r_j)^alpha
        f_k <- f_k - rate * sign(G_k - target_k) * g_k / mean_j G_j,   then scaled to sum_k f_k = K

    with r_k = L_k / L_k(first measured) and targets held constant. The published gradient of
    sum_k |G_k - target_k| is divided by the mean of G, so that `rate` has no unit. The shared representation
    is the final hidden states h of all the window's tokens: their norms add up exactly over micro-batches and
    ranks, and only the head is passed back through once more for each objective. The ratio is relative to
    the mean of ratios, as in equation 1 of the paper.

    Raises:
        BadInput: a loss is not above 0, so that it has no ratio.

    Source: Chen et al. 2018, arXiv:1711.02257.
    """

    def __init__(self, config: GradNormConfig, names: Sequence[str]) -> None:
        self.config = config
        self.factor = dict.fromkeys(names, 1.0)
        self.first: dict[str, float] = {}

    def factors(self) -> Factors:
        """See `Controller`."""
        return dict(self.factor)

    def observe(self, step: int, seen: Observed) -> None:
        """See `Controller`; a window that lacks one of the objectives moves nothing."""
        names = list(self.factor)
        if not all(name in seen.gradient_norms and name in seen.means for name in names):
            return
        losses = {name: _positive(name, seen.means[name], "gradnorm") for name in names}
        self.first = self.first or losses
        ratio = {name: losses[name] / self.first[name] for name in names}
        norm = {name: self.factor[name] * seen.gradient_norms[name] for name in names}
        mean_norm, mean_ratio = (_mean(values.values()) for values in (norm, ratio))
        if mean_norm == 0.0:
            return
        for name in names:
            target = mean_norm * (ratio[name] / mean_ratio) ** self.config.alpha
            slope = _sign(norm[name] - target) * seen.gradient_norms[name] / mean_norm
            self.factor[name] = max(LEAST_FACTOR, self.factor[name] - self.config.rate * slope)
        total = sum(self.factor.values())
        self.factor = {name: factor * len(names) / total for name, factor in self.factor.items()}

    def state(self) -> dict[str, Any]:
        """See `Controller`."""
        return {"factor": dict(self.factor), "first": dict(self.first)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `Controller`."""
        self.factor, self.first = dict(state["factor"]), dict(state["first"])


class DwaConfig(Config):
    """Dynamic weight averaging: see `DynamicWeightAverage`.

    Args:
        objectives: those to weigh; None: all.
        temperature: how soft the choice is; large: all alike.
        every_steps: steps in a period, whose mean losses are compared (the paper's epoch).
    """

    objectives: tuple[str, ...] | None = None
    temperature: PositiveFloat = 2.0
    every_steps: PositiveInt = 100


class DynamicWeightAverage:
    """An objective that falls more slowly than the others weighs more.

        factor_k = K exp(r_k / temperature) / sum_j exp(r_j / temperature)      r_k = L_k(t-1) / L_k(t-2)

    where t counts periods and L_k(t) is the mean over the steps of a period; 1 until two are over, and for
    an objective that one of them lacks.

    Raises:
        BadInput: a period's loss is not above 0, so that it has no ratio.

    Source: Liu, Johns and Davison 2019, arXiv:1803.10704, equation 7.
    """

    def __init__(self, config: DwaConfig, names: Sequence[str]) -> None:
        self.config = config
        self.ratio = dict.fromkeys(names, 1.0)
        self.before: dict[str, float] = {}
        self.sums: dict[str, list[float]] = {}
        """By objective, the sum of its means in this period, and of how many steps."""

    def factors(self) -> Factors:
        """See `Controller`."""
        largest = max(self.ratio.values())
        pull = {name: math.exp((r - largest) / self.config.temperature) for name, r in self.ratio.items()}
        total = sum(pull.values())
        return {name: len(pull) * value / total for name, value in pull.items()}

    def observe(self, step: int, seen: Observed) -> None:
        """See `Controller`."""
        for name in self.ratio:
            if name in seen.means:
                total, steps = self.sums.get(name, [0.0, 0])
                self.sums[name] = [total + seen.means[name], steps + 1]
        if (step + 1) % self.config.every_steps:
            return
        now = {name: _positive(name, total / steps, "dwa") for name, (total, steps) in self.sums.items()}
        for name in self.ratio:
            both = name in now and name in self.before
            self.ratio[name] = now[name] / self.before[name] if both else 1.0
        self.before, self.sums = now, {}

    def state(self) -> dict[str, Any]:
        """See `Controller`."""
        sums = {name: list(entry) for name, entry in self.sums.items()}
        return {"ratio": dict(self.ratio), "before": dict(self.before), "sums": sums}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `Controller`."""
        self.ratio, self.before = dict(state["ratio"]), dict(state["before"])
        self.sums = {name: list(entry) for name, entry in state["sums"].items()}


class LagrangianConfig(Config):
    """One loss under a bound: see `Lagrangian`.

    Args:
        objective: the name of the constrained one.
        bound: what its mean is kept under, in its own unit, above `reference`.
        rate: of the multiplier, per unit of violation and step.
        initial: the multiplier at the start.
        maximum: what it cannot exceed.
        reference: what the bound is measured from, such as the NLL of the model that training began from. For
            a bound relative to a reference on the very same tokens, constrain the objective `excess_nll`.
    """

    objective: str
    bound: float
    rate: PositiveFloat = 0.1
    initial: NonNegativeFloat = 1.0
    maximum: PositiveFloat = 100.0
    reference: float = 0.0

    @model_validator(mode="after")
    def _initial_is_allowed(self) -> LagrangianConfig:
        if self.initial > self.maximum:
            raise ValueError(f"initial ({self.initial}) is above maximum ({self.maximum})")
        return self


class Lagrangian:
    """Minimises the other objectives while one loss is kept under a bound, by dual ascent.

        min_theta max_{lambda >= 0}  sum_{k != c} w_k L_k + lambda * (L_c - reference - bound)
        lambda <- clip(lambda + rate * (L_c - reference - bound), 0, maximum)

    The multiplier lambda is the factor of the constrained objective. The bound holds in the mean over steps,
    to a violation that shrinks with the rate; each single step may lie above it.

    Source: Arrow, Hurwicz and Uzawa 1958; in training, Stooke, Achiam and Abbeel 2020, arXiv:2007.03964.
    """

    def __init__(self, config: LagrangianConfig) -> None:
        self.config = config
        self.multiplier = config.initial

    def factors(self) -> Factors:
        """See `Controller`."""
        return {self.config.objective: self.multiplier}

    def observe(self, step: int, seen: Observed) -> None:
        """See `Controller`."""
        if self.config.objective not in seen.means:
            return
        violation = seen.means[self.config.objective] - self.config.reference - self.config.bound
        self.multiplier = min(self.config.maximum, max(0.0, self.multiplier + self.config.rate * violation))

    def state(self) -> dict[str, Any]:
        """See `Controller`."""
        return {"multiplier": self.multiplier}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `Controller`."""
        self.multiplier = state["multiplier"]


class DoremiConfig(Config):
    """Slices reweighted by their excess loss over a reference: see `Doremi`.

    Args:
        rate: of the exponentiated gradient.
        smoothing: the share of the uniform distribution that is mixed in.
    """

    rate: PositiveFloat = 1.0
    smoothing: float = Field(default=1e-3, gt=0.0, le=1.0)


class Doremi:
    """Slices that are further above the reference than they need be weigh more (group DRO).

        a_i <- a_i exp(rate * e_i) / sum_j a_j exp(rate * e_j),   then   a_i <- (1 - c) a_i + c / S
        e_i = mean over counted tokens of max(0, NLL - NLL of the reference)        factor_i = S a_i

    with c the smoothing, and a uniform at first. A slice that a window lacks keeps its last excess. A factor
    multiplies the weights of the tokens of its slice, so under `reduction: {by: token}` a slice counts by its
    tokens times a_i: where the mixture is even that is the published sum_i a_i * mean_i. The paper trains its
    large model on the mean of a over all steps, which the report shows.

    Source: Xie et al. 2023, arXiv:2305.10429, algorithm 1.
    """

    def __init__(self, config: DoremiConfig, slices: Sequence[str]) -> None:
        self.config = config
        self.share = dict.fromkeys(slices, 1.0 / len(slices))
        self.excess = dict.fromkeys(slices, 0.0)

    def factors(self) -> Factors:
        """Of the slices; see `Controller`."""
        return {name: len(self.share) * share for name, share in self.share.items()}

    def observe(self, step: int, seen: Observed) -> None:
        """See `Controller`; slices that it does not weigh, such as those of rollouts, are passed over."""
        self.excess |= {name: excess for name, excess in seen.excess.items() if name in self.excess}
        largest = max(self.excess.values())
        pull = {
            name: share * math.exp(self.config.rate * (self.excess[name] - largest))
            for name, share in self.share.items()
        }
        total, smoothing = sum(pull.values()), self.config.smoothing
        self.share = {
            name: (1 - smoothing) * value / total + smoothing / len(pull) for name, value in pull.items()
        }

    def state(self) -> dict[str, Any]:
        """See `Controller`."""
        return {"share": dict(self.share), "excess": dict(self.excess)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `Controller`."""
        self.share, self.excess = dict(state["share"]), dict(state["excess"])


def _mean(values: Iterable[float]) -> float:
    kept = list(values)
    return sum(kept) / len(kept)


def _sign(value: float) -> float:
    return math.copysign(1.0, value) if value else 0.0


def _positive(name: str, loss: float, way: str) -> float:
    if loss <= 0.0:
        raise _unfit(name, loss, way)
    return loss


def _not_negative(name: str, loss: float, way: str) -> float:
    if loss < 0.0:
        raise _unfit(name, loss, way)
    return loss


def _unfit(name: str, loss: float, way: str) -> BadInput:
    return BadInput(
        f"{way} cannot weigh the objective {name}, whose mean is {loss:.4g}: it needs losses above 0",
        fix=f"leave it out: `{way}: {{objectives: [...]}}`",
    )
