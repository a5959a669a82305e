"""The weights of a run: those of its objectives and slices, fixed or adapting to what the run measures.

    blend: {lagrangian: {objective: prose, bound: 0.02, rate: 0.5}}
    blend: {uncertainty: {}}        blend: {gradnorm: {alpha: 1.5}}        blend: {dwa: {temperature: 2.0}}
    blend: {doremi: {rate: 1.0}}                                           alone or beside one of the others

    Composite.weights(step), Controller.factors() --Blend.weights--> Weights

The weight of an objective is its own entry's weight (a number or a schedule) times the factor of its
controller (`adapt.py`); without `blend` the factors are 1.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import model_validator

from gyrocompass.core.config import Config
from gyrocompass.core.errors import BadInput, ConfigError, did_you_mean
from gyrocompass.loss.adapt import (
    Controller,
    Doremi,
    DoremiConfig,
    DwaConfig,
    DynamicWeightAverage,
    GradNorm,
    GradNormConfig,
    Lagrangian,
    LagrangianConfig,
    Observed,
    Uncertainty,
    UncertaintyConfig,
)
from gyrocompass.loss.objective import Composite


class BlendConfig(Config):
    """How a run's weights adapt: at most one way for the objectives, and perhaps one for the slices."""

    uncertainty: UncertaintyConfig | None = None
    gradnorm: GradNormConfig | None = None
    dwa: DwaConfig | None = None
    lagrangian: LagrangianConfig | None = None
    doremi: DoremiConfig | None = None

    @model_validator(mode="after")
    def _one_way_for_the_objectives(self) -> BlendConfig:
        ways = ("uncertainty", "gradnorm", "dwa", "lagrangian")
        given = [name for name in ways if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"the objectives are weighed one way, not by {' and '.join(given)}")
        if not given and self.doremi is None:
            raise ValueError(f"name one of {', '.join(ways)}, doremi; without `blend` weights are fixed")
        return self

    def adapted(self, objectives: Sequence[str]) -> tuple[str, ...]:
        """The names of the objectives that are adapted.

        Raises:
            ConfigError: one of them does not exist, or there is nothing to weigh it against.
        """
        chosen = self.uncertainty or self.gradnorm or self.dwa
        names = weighed = tuple(objectives)
        if self.lagrangian is not None:
            names = (self.lagrangian.objective,)
        elif chosen is None:
            return ()
        elif chosen.objectives is not None:
            names = weighed = chosen.objectives
        for name in names:
            if name not in objectives:
                raise ConfigError(f"blend: there is no objective {name}{did_you_mean(name, objectives)}")
        if len(set(weighed)) < max(2, len(weighed)):
            raise ConfigError("blend: it weighs objectives against each other: name at least two, each once")
        return names


class Weights(NamedTuple):
    """The constants of one window."""

    objectives: dict[str, float]
    slices: dict[str, float]
    """What token weights are multiplied by; empty: they stay as they are."""


class Blend:
    """The weights of a run, fixed without a config.

    Args:
        config: how they adapt.
        objective: its names, and its own weights at each step.
        slices: of the run's data; None where they are not known beforehand.

    Raises:
        ConfigError: names that do not fit.
        BadInput: slices are to be reweighted and are not known.

    >>> from gyrocompass.loss.objective import parse_objectives
    >>> objective = parse_objectives(["nll", {"focal": {"weight": 0.5}}])
    >>> blend = Blend(BlendConfig(lagrangian=LagrangianConfig(objective="nll", bound=2.0)), objective, None)
    >>> blend.observe(0, Observed({"nll": 3.0, "focal": 1.0}, {}, {}))
    >>> blend.weights(1).objectives
    {'nll': 1.1, 'focal': 0.5}
    """

    def __init__(
        self, config: BlendConfig | None, objective: Composite, slices: Collection[str] | None
    ) -> None:
        self._objective = objective
        self._gradnorm = config.gradnorm if config is not None else None
        self._objectives = None if config is None else _controller(config, objective.names)
        self._slices: Doremi | None = None
        if config is not None and config.doremi is not None:
            if not slices:
                raise BadInput("doremi reweighs the slices of a data set", fix="train on one, or drop it")
            self._slices = Doremi(config.doremi, sorted(slices))

    @property
    def reads_excess(self) -> bool:
        """Whether it needs each slice's excess over the reference."""
        return self._slices is not None

    def reads_gradient_norms(self, step: int) -> bool:
        """Whether it needs each objective's gradient norm at this step."""
        return self._gradnorm is not None and step % self._gradnorm.every_steps == 0

    def weights(self, step: int) -> Weights:
        """The weights of an optimizer step, counted from 0."""
        factors = self._objectives.factors() if self._objectives is not None else {}
        own = self._objective.weights(step)
        slices = self._slices.factors() if self._slices is not None else {}
        return Weights({name: weight * factors.get(name, 1.0) for name, weight in own.items()}, slices)

    def observe(self, step: int, seen: Observed) -> None:
        """Take what the window of a step measured."""
        for controller in self._controllers():
            controller.observe(step, seen)

    def state(self) -> list[dict[str, Any]]:
        """Of each controller, as JSON."""
        return [controller.state() for controller in self._controllers()]

    def restore(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Take over what `state` returned."""
        for controller, own in zip(self._controllers(), state, strict=True):
            controller.restore(own)

    def _controllers(self) -> list[Controller]:
        return [controller for controller in (self._objectives, self._slices) if controller is not None]


def _controller(config: BlendConfig, objectives: Sequence[str]) -> Controller | None:
    names = config.adapted(objectives)
    if config.uncertainty is not None:
        return Uncertainty(config.uncertainty, names)
    if config.gradnorm is not None:
        return GradNorm(config.gradnorm, names)
    if config.dwa is not None:
        return DynamicWeightAverage(config.dwa, names)
    return None if config.lagrangian is None else Lagrangian(config.lagrangian)
