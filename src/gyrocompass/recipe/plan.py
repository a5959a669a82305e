"""The plan of a recipe: its stages in order, what is finished already, and the run of what is not.

    recipe --plan--> [Step(name, stage, key, artifact | None)] --execute--> the same with every artifact

A step whose inputs are known has a key; a key that the store knows is a finished stage. The plan is made anew
before each stage, so that it always tells the truth about what is on disk.

Under `torchrun` the first rank runs the stages that know nothing of ranks while the others wait; stages
that do (training) are run by all, and the first rank writes.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from gyrocompass.core.artifact import Artifact, Draft
from gyrocompass.core.errors import ConfigError, DamagedArtifact, GyroError
from gyrocompass.core.progress import Progress
from gyrocompass.core.store import Store
from gyrocompass.model.fit import check_context
from gyrocompass.recipe.stage import Stage, Workplace
from gyrocompass.recipe.stages.model import ImportedModelStage, NewModelStage
from gyrocompass.recipe.stages.score import ScoreStage
from gyrocompass.recipe.stages.train import TrainStage
from gyrocompass.train.distributed import World
from gyrocompass.train.metrics import MlflowConfig


class Step(NamedTuple):
    """One stage of a plan; key and artifact are None as long as they cannot be known."""

    name: str
    stage: Stage
    parents: dict[str, str]
    """Role -> name of the stage it comes from."""
    key: str | None
    artifact: Artifact | None


class Done(NamedTuple):
    """A finished stage of a run."""

    name: str
    stage: Stage
    artifact: Artifact
    reused: bool
    seconds: float


def order(stages: Mapping[str, Stage]) -> list[str]:
    """The names of the stages, inputs before what reads them, else as the recipe lists them.

    Args:
        stages: by name; every stage that one of them names is there.

    Raises:
        ConfigError: stages wait for each other.
    """
    ordered: list[str] = []
    waiting: list[str] = []

    def visit(name: str) -> None:
        if name in ordered:
            return
        if name in waiting:
            circle = " -> ".join([*waiting[waiting.index(name) :], name])
            raise ConfigError(f"stages wait for each other: {circle}", fix="take one of these references out")
        waiting.append(name)
        for reference in stages[name].references().values():
            visit(reference)
        waiting.pop()
        ordered.append(name)

    for name in stages:
        visit(name)
    return ordered


def check_lengths(stages: Mapping[str, Stage]) -> None:
    """Refuse rows longer than their model's context where the recipe alone tells, before anything runs.

    Raises:
        BadInput: a training or score stage has such rows.
    """
    for name in order(stages):
        stage = base = stages[name]
        while isinstance(base, TrainStage | ScoreStage):
            base = stages[base.model]
        if (
            isinstance(stage, TrainStage | ScoreStage)
            and isinstance(base, NewModelStage | ImportedModelStage)
            and base.context is not None
        ):
            check_context(base.context, stage.sequence_length, f"stages.{name}")


def plan(stages: Mapping[str, Stage], store: Store | None) -> list[Step]:
    """Every stage in order, with its key and artifact where they are known; without a store, none is."""
    check_lengths(stages)
    steps: dict[str, Step] = {}
    for name in order(stages):
        stage = stages[name]
        references = stage.references()
        parents = {role: steps[reference].artifact for role, reference in references.items()}
        ids = {role: artifact.id for role, artifact in parents.items() if artifact is not None}
        key = stage.key(ids) if len(ids) == len(parents) else None
        steps[name] = Step(name, stage, references, key, store.find(key) if key and store else None)
    return list(steps.values())


def execute(
    stages: Mapping[str, Stage],
    store: Store,
    progress: Progress,
    world: World,
    tracking: MlflowConfig | None = None,
) -> Iterator[Done]:
    """Run what is not finished, yielding each stage as it is done or found.

    Args:
        stages: by name.
        store: where artifacts are found and land.
        progress: shown to the user.
        world: this process among its peers.
        tracking: where training stages report besides their own files.
    """
    check_lengths(stages)
    done: dict[str, Artifact] = {}
    for name in order(stages):
        stage = stages[name]
        inputs = {role: done[reference] for role, reference in stage.references().items()}
        key = stage.key({role: artifact.id for role, artifact in inputs.items()})
        started = time.perf_counter()
        # Only the first rank looks: another might see what the first has meanwhile written.
        found = _find(store, key, name, progress) if world.is_first else None
        reused = world.gather_json(found is not None)[0]
        if not reused:
            work = store.work_dir(key)
            _run(Workplace(name, inputs, work, store, progress, world, tracking), stage, key)
            world.barrier()
        artifact = found or store.find(key)
        assert artifact is not None, "the first rank has written it"
        done[name] = artifact
        yield Done(name, stage, artifact, reused, time.perf_counter() - started)


def _find(store: Store, key: str, name: str, progress: Progress) -> Artifact | None:
    """What the stage made, if it is whole; what is damaged is set aside, and the stage makes it again."""
    try:
        return store.find(key)
    except DamagedArtifact as error:
        aside = store.set_aside(key)
        progress.note(f"{name}: {error.what} ({error.where}); set aside as {aside}, and made again")
        return None


def _run(workplace: Workplace, stage: Stage, key: str) -> None:
    if workplace.world.is_first:
        store, settings = workplace.store, stage.settings()
        with store.locked_work(key, f"stages.{workplace.name}"):
            parents = {**workplace.inputs, **stage.origins()}
            with (
                store.create(key, stage.makes, parents=parents, recipe=settings) as draft,
                _placed(workplace),
            ):
                stage.run(workplace, draft)
            store.forget_work(key)
    elif stage.distributed:
        with tempfile.TemporaryDirectory() as scratch, _placed(workplace):
            stage.run(workplace, Draft(Path(scratch), stage.makes, {}, {}))


@contextmanager
def _placed(workplace: Workplace) -> Iterator[None]:
    """Errors that do not know where they arose (a loss sees no recipe) are those of the stage."""
    try:
        yield
    except GyroError as error:
        if error.where is None:
            error.where = f"stages.{workplace.name}"
        raise
