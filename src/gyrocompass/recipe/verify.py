"""`gyro verify`: proves a run before its first hour, on its own first batches.

    recipe --stages that need no trained model--> the store (a later run reuses them)
    each training stage --checks--> rows of passed and failed, each with its number beside its bound

A stage that goes on from a trained model is checked on the model that its chain begins with: the trained one
does not exist yet. So is whatever else in the recipe reads a trained model to make training data.

The checks run in one process; that ranks change nothing is left to the tests of the loop.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gyrocompass.core.artifact import Artifact
from gyrocompass.core.errors import BadInput, GyroError
from gyrocompass.core.progress import Progress, duration
from gyrocompass.core.store import Store
from gyrocompass.recipe.plan import check_lengths, execute, order
from gyrocompass.recipe.recipe import Recipe
from gyrocompass.recipe.stage import Stage
from gyrocompass.recipe.stages.train import TrainStage
from gyrocompass.recipe.verify_checks import one_signal, packing, partition
from gyrocompass.recipe.verify_data import accounting, disjointness
from gyrocompass.recipe.verify_preview import preview, visible
from gyrocompass.recipe.verify_resume import resume
from gyrocompass.recipe.verify_subject import Check, Finding, Subject
from gyrocompass.train.distributed import World

CHECKS: Mapping[str, Check] = {
    "preview": preview,
    "packed = unpacked": packing,
    "partition": partition,
    "kill and resume": resume,
    "accounting": accounting,
    "one signal": one_signal,
    "held-out is disjoint": disjointness,
}


class Row(NamedTuple):
    """One line of the table."""

    check: str
    stage: str
    finding: Finding
    seconds: float

    @property
    def word(self) -> str:
        """What became of it."""
        return {True: "passed", False: "FAILED", None: "left out"}[self.finding.passed]


def verify_recipe(
    recipe: Recipe, store: Store, console: Console, checks: Mapping[str, Check] = CHECKS
) -> list[Row]:
    """Run what training needs, then every check on every training stage; print the table.

    Args:
        recipe: any recipe with a training stage.
        store: where artifacts are found and land, those of a later run.
        console: where preview, progress and table go.
        checks: by name, in the order of the table.

    Raises:
        BadInput: there is no training stage, or an input is wrong.
    """
    check_lengths(recipe.stages)
    if not trainings(recipe.stages):
        raise BadInput(
            f"the recipe {recipe.name} has no training stage, so there is nothing to verify",
            fix="add a stage of the kind train, or run it with `gyro run`",
        )
    started = time.perf_counter()
    rows = []
    with Progress(console) as progress:
        for subject in _subjects(recipe, store, progress):
            for name, check in checks.items():
                rows.append(_row(name, check, subject))
                finding = rows[-1].finding
                found = f"{finding.measured} ({finding.over})" if finding.over else finding.measured
                progress.note(f"{subject.name}: {name}: {rows[-1].word}  {found}")
    _print(rows, time.perf_counter() - started, console)
    return rows


def all_passed(rows: Sequence[Row]) -> bool:
    """Whether no check failed."""
    return all(row.finding.passed is not False for row in rows)


# --- from a recipe to what is checked ---


def trainings(stages: Mapping[str, Stage]) -> dict[str, TrainStage]:
    """The training stages by name, each after those it goes on from."""
    return {name: stage for name in order(stages) if isinstance(stage := stages[name], TrainStage)}


def model_chain(stages: Mapping[str, Stage], name: str) -> list[str]:
    """A training stage, the one whose model it trains, and so on to the stage that is not training."""
    chain = [name]
    while isinstance(stage := stages[chain[-1]], TrainStage):
        chain.append(stage.model)
    return chain


def untrained(stages: Mapping[str, Stage]) -> dict[str, Stage]:
    """The stages that training reads, every trained model replaced by the one its chain begins with."""
    trained = {name: model_chain(stages, name)[-1] for name in trainings(stages)}
    needed: dict[str, Stage] = {}

    def visit(name: str) -> None:
        if name not in needed:
            needed[name] = _reading(stages[name], trained)
            for reference in needed[name].references().values():
                visit(reference)

    for stage in trainings(stages).values():
        for reference in stage.references().values():
            visit(trained.get(reference, reference))
    return needed


def _reading(stage: Stage, instead: Mapping[str, str]) -> Stage:
    """A stage that reads other stages instead of some."""
    changes: dict[str, str | tuple[str, ...]] = {}
    for field in {role.partition(".")[0] for role in stage.references()} & set(stage.reference_fields()):
        names = getattr(stage, field)
        one = isinstance(names, str)
        changes[field] = (
            instead.get(names, names) if one else tuple(instead.get(name, name) for name in names)
        )
    return stage.model_copy(update=changes)


def _subjects(recipe: Recipe, store: Store, progress: Progress) -> Iterator[Subject]:
    world = World(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    artifacts: dict[str, Artifact] = {}
    for done in execute(untrained(recipe.stages), store, progress, world):
        artifacts[done.name] = done.artifact
        how = "reused" if done.reused else duration(done.seconds)
        progress.note(f"{done.name}: {how}  {done.artifact.id}")
    for name, stage in trainings(recipe.stages).items():
        if stage.data is None:
            progress.note(f"{name}: learns from its own samples, of which there are none before it runs")
            continue
        if stage.rollouts is not None:
            progress.note(f"{name}: checked without its own samples, of which there are none before it runs")
        _, *before, base = model_chain(recipe.stages, name)
        if before:
            progress.note(f"{name}: goes on from {before[0]}, not trained yet, so checked on {base}")
        earlier = [recipe.stages[trained] for trained in before]
        yield Subject(
            name,
            stage.of_data(),
            artifacts[base],
            artifacts[stage.data],
            artifacts[stage.held_out] if stage.held_out else None,
            _reference_folder(recipe, stage, artifacts),
            tuple(artifacts[one.data] for one in earlier if isinstance(one, TrainStage) and one.data),
            store,
            progress,
            world.device,
        )


def _reference_folder(recipe: Recipe, stage: TrainStage, artifacts: Mapping[str, Artifact]) -> Path | None:
    """That of a live reference; of a trained one, that of the model which its chain begins with."""
    if stage.reference is None:
        return stage.reference_folder
    return artifacts[model_chain(recipe.stages, stage.reference)[-1]].path


def _row(name: str, check: Check, subject: Subject) -> Row:
    started = time.perf_counter()
    try:
        finding = check(subject)
    except BadInput:
        raise
    except GyroError as error:
        finding = Finding(False, f"stopped: {error.what.splitlines()[0]}", "", str(error))
    return Row(name, subject.name, finding, time.perf_counter() - started)


# --- what is said about it ---


def _print(rows: Sequence[Row], seconds: float, console: Console) -> None:
    table = Table(title="verified before the first step", title_justify="left")
    for heading in ("check", "stage", "", "measured", "bound"):
        table.add_column(heading, overflow="fold")
    table.add_column("s", justify="right")
    for row in rows:
        style = {True: "green", False: "bold red", None: "dim"}[row.finding.passed]
        numbers = (row.finding.measured, row.finding.bound, f"{row.seconds:.1f}")
        table.add_row(
            Text(row.check), Text(row.stage), Text(row.word, style), *(Text(number) for number in numbers)
        )
    console.print(table)
    failed = [row for row in rows if row.finding.passed is False]
    for row in failed:
        where = visible(row.finding.look_at)  # it may name documents
        console.print(
            f"{row.stage}: {row.check} failed. Look at: {where}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    n_passed = sum(row.finding.passed is True for row in rows)
    console.print(f"{n_passed} passed, {len(failed)} failed in {seconds:.0f} s", highlight=False)
