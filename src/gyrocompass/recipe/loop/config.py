"""The file of `gyro loop`: what is learned from, by which recipe, when, and what a challenger has to pass.

    name: assistant                  # registered; its champion is what the loop improves
    recipe: challenger.yaml          # with ${champion} and ${feedback} where their folders belong
    with: {replay: documents-0123}   # more such words: ids of artifacts, or anything else
    model: fine_tuned                # the stage that makes the challenger
    calibration: calibrated          # the stage that calibrates it
    policy: policy.yaml              # served with it; its calibrator becomes the one made here
    rule: rule.yaml                  # of its promotion
    rollout: canary.yaml             # how it is tried first
    trigger: {verdicts: 50, hours: 168, drift: true}

The recipe says the rest: how feedback is curated, the share of old data that is replayed against forgetting
(`slice_weights`), objectives, evaluations.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from gyrocompass.core.config import Config, LoadedYaml, load_yaml, parse
from gyrocompass.core.errors import BadInput
from gyrocompass.govern.promote import PromotionRule
from gyrocompass.govern.rollout import RolloutPlan
from gyrocompass.recipe.recipe import BUILTIN, Recipe, builtin_names
from gyrocompass.serve.policy import Policy, load_policy


class Trigger(Config):
    """When a cycle begins: as soon as one of them says so."""

    verdicts: int | None = Field(default=None, ge=1)
    """So many answers decided by people since the last cycle."""
    hours: float | None = Field(default=None, gt=0)
    """Since the last cycle began; there has to be a new verdict."""
    drift: bool = False
    """An alarm in what is asked or in how sure the model is (`measure.drift`): a slice's loss that rises is
    one; there has to be a new verdict."""
    plateau: bool = False
    """A slice's held-out loss stood still or rose while the champion was trained (`suggest`): once for each
    champion; there has to be a new verdict."""

    @model_validator(mode="after")
    def _there_is_one(self) -> Trigger:
        if self.verdicts is None and self.hours is None and not self.drift and not self.plateau:
            raise ValueError("say when a cycle begins: verdicts, hours, drift or plateau")
        return self


class LoopConfig(Config):
    """All of it; paths are relative to the file."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    recipe: str = Field(min_length=1)
    """A file, or a built-in recipe."""
    given: dict[str, str] = Field(default_factory=dict, alias="with")
    """More words that stand in the recipe as ${word}: an artifact's id becomes its folder."""
    model: str = Field(min_length=1)
    calibration: str | None = None
    policy: Path | None = None
    rule: Path
    rollout: Path | None = None
    """None: a challenger that passes the rule is champion at once."""
    trigger: Trigger
    all_texts: bool = False
    """Whether texts of users who did not agree are learned from: for texts that are one's own."""
    poll_s: float = Field(default=30.0, gt=0)


class Loop:
    """A loop's files, read and checked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = parse(LoopConfig, load_yaml(path))
        self.rule = parse(PromotionRule, load_yaml(self._near(self.config.rule)))
        self.rollout: RolloutPlan | None = None
        if self.config.rollout is not None:
            self.rollout = parse(RolloutPlan, load_yaml(self._near(self.config.rollout)))
        self.policy: Policy | None = None
        if self.config.policy is not None:
            self.policy = load_policy(self._near(self.config.policy))
        self._loaded = self._recipe()
        words = {"champion": "C", "feedback": "F"} | dict.fromkeys(self.config.given, "G")
        self.recipe(words, "check")  # mistakes are told before anything waits for them

    def recipe(self, words: dict[str, str], run: str) -> Recipe:
        """The recipe with its words filled in, under the name of a run.

        Raises:
            BadInput: a ${word} is not known, or a stage that the loop speaks of is not there.
            ConfigError: the recipe is wrong.
        """
        loaded = self._loaded

        def fill(text: str, path: tuple[str, ...]) -> str:
            new = text
            for word, value in words.items():
                new = new.replace(f"${{{word}}}", value)
            if "${" in new:
                raise BadInput(
                    f"{text!r} has a word that is not known; there is {', '.join(sorted(words))}",
                    where=loaded.place(path),
                )
            return new

        data = _mapped(loaded.data, fill) | {"name": run}
        found = parse(Recipe, LoadedYaml(data, loaded.where, loaded.root, loaded.overridden))
        for stage in (self.config.model, self.config.calibration):
            if stage is not None and stage not in found.stages:
                raise BadInput(
                    f"the recipe has no stage {stage!r}; it has {', '.join(found.stages)}", where=self.path
                )
        return found

    def _recipe(self) -> LoadedYaml:
        if self.config.recipe in builtin_names():
            return load_yaml(BUILTIN / f"{self.config.recipe}.yaml")
        return load_yaml(self._near(Path(self.config.recipe)))

    def _near(self, path: Path) -> Path:
        return path if path.is_absolute() else self.path.parent / path


def _mapped(data: Any, fill: Callable[[str, tuple[str, ...]], str], path: tuple[str, ...] = ()) -> Any:
    """A copy with each text replaced by what `fill` makes of it and its path."""
    if isinstance(data, str):
        return fill(data, path)
    if isinstance(data, dict):
        return {key: _mapped(value, fill, (*path, str(key))) for key, value in data.items()}
    if isinstance(data, list):
        return [_mapped(value, fill, (*path, str(place))) for place, value in enumerate(data)]
    return data
