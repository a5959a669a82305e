"""What a recipe alone shows to be wrong between its stages, by the path of the key that says it.

    reference_mistakes   a stage that is not there, or makes something else
    input_mistakes       a stage that makes the right thing, but not one that can be used so

The recipe places each at its line. What only the artifacts can tell is checked when a stage begins.
"""

from __future__ import annotations

from collections.abc import Mapping

from gyrocompass.core.errors import did_you_mean
from gyrocompass.model.scalar_head import FILE as SCALAR_HEAD
from gyrocompass.recipe.stage import Stage
from gyrocompass.recipe.stages.columns import ReferenceStage, TeacherTopKStage
from gyrocompass.recipe.stages.judging import JudgingStage
from gyrocompass.recipe.stages.model import ImportedModelStage
from gyrocompass.recipe.stages.train import TrainStage

Mistake = tuple[tuple[str, ...], str]
"""The path of a key below `stages`, and what is wrong there."""


def reference_mistakes(stages: Mapping[str, Stage]) -> list[Mistake]:
    """Every reference to a stage that is not there or makes something else, by the path of its key."""
    mistakes: list[Mistake] = []
    for name, stage in stages.items():
        for role, reference in stage.references().items():
            wanted = stage.wanted(role)
            fitting = [other for other, made in stages.items() if not wanted or made.makes in wanted]
            if reference in fitting:
                continue
            what = f"there is no stage {reference!r}"
            if reference in stages:
                what = f"{reference} makes {stages[reference].makes}, and {wanted[0]} is needed here"
            path = (name, *role.split("."))
            mistakes.append((path, what + did_you_mean(reference, [n for n in fitting if n != name])))
    return mistakes


def input_mistakes(stages: Mapping[str, Stage]) -> list[Mistake]:
    """Rewards by models that are no reward models, and references that are given twice.

    Args:
        stages: by name; `reference_mistakes` has found nothing.
    """
    mistakes: list[Mistake] = []
    for name, stage in stages.items():
        if isinstance(stage, JudgingStage):
            mistakes += _no_reward_models(name, stage, stages)
        if isinstance(stage, TrainStage) and stage.has_reference and stage.data is not None:
            mistakes += _given_twice(name, stage.data, stages)
    return mistakes


def _no_reward_models(name: str, stage: JudgingStage, stages: Mapping[str, Stage]) -> list[Mistake]:
    fitting = [other for other in stages if _has_scalar_head(other, stages)]
    return [
        (
            (name, *role.split(".")),
            f"{judge} makes a model without a scalar head, which is no reward model"
            + (did_you_mean(judge, fitting) or "; train one with `scalar_head: true`"),
        )
        for role, judge in stage.reward_models().items()
        if judge not in fitting
    ]


def _has_scalar_head(name: str, stages: Mapping[str, Stage]) -> bool:
    """Whether a stage's model has one, as far as the recipe tells; an imported folder may hold one."""
    passed: list[str] = []
    while isinstance(stage := stages[name], TrainStage) and name not in passed:
        if stage.scalar_head:
            return True
        passed.append(name)
        name = stage.model
    return isinstance(stage, ImportedModelStage) and (stage.folder / SCALAR_HEAD).is_file()


def _given_twice(name: str, data: str, stages: Mapping[str, Stage]) -> list[Mistake]:
    passed: list[str] = []
    while isinstance(stage := stages[data], TeacherTopKStage) and data not in passed:
        passed.append(data)
        data = stage.data
    if not isinstance(stage, ReferenceStage):
        return []
    what = f"the data has a reference already, from {data}: train on {stage.data}, or name no other reference"
    return [((name, "data"), what)]
