"""A recipe: a whole run as typed config, read from YAML.

    name: stdlib
    stages:
      documents: {kind: documents, sources: [...]}
      pretrained: {kind: train, model: untrained, data: train_tokens, steps: 300, ...}

Stages are named by the recipe and refer to each other by name; the order they are written in is free.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from gyrocompass.core.config import Config, LoadedYaml, MistakesBelow, load_yaml, parse
from gyrocompass.core.errors import BadInput, ConfigError, did_you_mean
from gyrocompass.recipe.mistakes import input_mistakes, reference_mistakes
from gyrocompass.recipe.stages.alignment import AlignmentStage
from gyrocompass.recipe.stages.calibration import CalibrationStage
from gyrocompass.recipe.stages.columns import ReferenceStage, TeacherTopKStage
from gyrocompass.recipe.stages.corpus import (
    CuratedStage,
    DocumentsStage,
    PairsStage,
    SplitStage,
    TogetherStage,
)
from gyrocompass.recipe.stages.evaluation import EvaluationStage
from gyrocompass.recipe.stages.function_tests import FunctionTestsStage
from gyrocompass.recipe.stages.model import GgufModelStage, ImportedModelStage, NewModelStage
from gyrocompass.recipe.stages.preference import PreferencesStage
from gyrocompass.recipe.stages.score import CompletionsStage, ScoreStage
from gyrocompass.recipe.stages.tokens import ImportedTokenizerStage, TokenizerStage, TokensStage
from gyrocompass.recipe.stages.train import TrainStage
from gyrocompass.train.metrics import MlflowConfig, mlflow_if_installed

AnyStage = Annotated[
    DocumentsStage
    | CuratedStage
    | SplitStage
    | TogetherStage
    | PairsStage
    | PreferencesStage
    | FunctionTestsStage
    | TokenizerStage
    | ImportedTokenizerStage
    | TokensStage
    | ReferenceStage
    | TeacherTopKStage
    | NewModelStage
    | ImportedModelStage
    | GgufModelStage
    | TrainStage
    | ScoreStage
    | AlignmentStage
    | EvaluationStage
    | CalibrationStage
    | CompletionsStage,
    Field(discriminator="kind"),
]


class Tracking(Config):
    """Where metrics go besides the JSONL file that every run writes."""

    mlflow: MlflowConfig | None = Field(default_factory=mlflow_if_installed)
    """By default on where MLflow is installed, in its own SQLite store; `null`: off."""


class Recipe(Config):
    """A whole run."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    description: str = ""
    tracking: Tracking = Field(default_factory=Tracking)
    variants: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Named sets of overrides, path -> value: `small: {stages.pretrained.steps: 10}`."""
    stages: dict[str, AnyStage] = Field(min_length=1)

    @model_validator(mode="after")
    def _check_references(self) -> Recipe:
        mistakes = reference_mistakes(self.stages) or input_mistakes(self.stages)
        if mistakes:
            raise MistakesBelow((("stages", *path), message) for path, message in mistakes)
        return self


BUILTIN = files("gyrocompass.recipe") / "builtin"


def builtin_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(
        entry.name.removesuffix(".yaml") for entry in BUILTIN.iterdir() if entry.name.endswith(".yaml")
    )


def load_recipe(path_or_name: str, overrides: Sequence[str] = (), variant: str | None = None) -> Recipe:
    """Read a recipe file, or a built-in recipe by name.

    Args:
        path_or_name: a YAML file, or the name of a recipe that comes with the package.
        overrides: `a.b=c`, applied last.
        variant: one of the recipe's own named sets of overrides.

    Raises:
        BadInput: there is no such file and no such built-in recipe.
        ConfigError: the recipe is wrong; each mistake with its line and the nearest known name.
    """
    path = Path(path_or_name)
    if path.suffix in (".yaml", ".yml") or path.exists():
        loaded = load_yaml(path)
    elif path_or_name in builtin_names():
        loaded = load_yaml(BUILTIN / f"{path_or_name}.yaml")
    else:
        raise BadInput(
            f"there is no recipe {path_or_name!r}{did_you_mean(path_or_name, builtin_names())}",
            fix="give a YAML file, or the name of a built-in recipe",
        )
    if variant is not None:
        loaded = loaded.override(_variant(parse(Recipe, loaded), variant))
    return parse(Recipe, loaded.override(overrides))


def _variant(recipe: Recipe, name: str) -> list[str]:
    if name not in recipe.variants:
        raise ConfigError(
            f"recipe {recipe.name} has no variant {name!r}{did_you_mean(name, recipe.variants)}"
        )
    return [f"{path}={json.dumps(value)}" for path, value in recipe.variants[name].items()]


def recipe_from(data: dict[str, Any], overrides: Sequence[str], where: str) -> Recipe:
    """Check a recipe that was put together by a command."""
    return parse(Recipe, LoadedYaml(data, where, None).override(overrides))
