"""Running a recipe for a person: stage lines, the record of the run, the table and the report at the end.

    recipe --execute--> stages, one line each --> runs/<name>/run.json --> table on the terminal, report.html

The record names every stage's artifact, so that a report can be made again from the store alone.
"""

from __future__ import annotations

import datetime
import time
from pathlib import Path

import torch
from pydantic import ValidationError
from rich.console import Console

from gyrocompass.core.artifact import code_version
from gyrocompass.core.errors import BadInput, DamagedArtifact, did_you_mean
from gyrocompass.core.folder import write_whole
from gyrocompass.core.progress import Progress
from gyrocompass.core.store import Store
from gyrocompass.recipe.plan import Done, execute, plan
from gyrocompass.recipe.recipe import Recipe
from gyrocompass.recipe.record import RECORD, RunRecord, StageRecord
from gyrocompass.recipe.report import print_report, write_report
from gyrocompass.recipe.report_judgement import print_judgements, write_judgements
from gyrocompass.train.distributed import world_from_environment


def run_recipe(recipe: Recipe, store: Store, console: Console) -> Path:
    """Run what is not finished, print what became of it, and return the path of the HTML report."""
    started, started_at = time.perf_counter(), datetime.datetime.now(datetime.UTC)
    records: list[StageRecord] = []
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with world_from_environment(device) as world, Progress(console, quiet=not world.is_first) as progress:
        for done in execute(recipe.stages, store, progress, world, recipe.tracking.mlflow):
            records.append(_stage_record(done))
            if world.is_first:
                progress.note(_line(done, len(records), len(recipe.stages)))
        is_first = world.is_first
    record = RunRecord(
        recipe=recipe.name,
        description=recipe.description,
        started_at=started_at.isoformat(timespec="seconds"),
        seconds=time.perf_counter() - started,
        code_version=code_version(),
        stages=records,
    )
    folder = run_folder(store, recipe.name)
    if is_first:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / RECORD, record.model_dump_json(indent=2))
        show(record, store, console)
    return folder / "report.html"


def show(record: RunRecord, store: Store, console: Console) -> None:
    """Print a run's table and write its HTML report."""
    print_report(record, store, console)
    print_judgements(record, store, console)
    folder = run_folder(store, record.recipe)
    path = write_report(record, store, folder)
    for page in write_judgements(record, store, folder):
        console.print(f"{page.stem}: {page}", highlight=False, soft_wrap=True)
    reused = sum(stage.reused for stage in record.stages)
    console.print(
        f"\n{len(record.stages)} stages in {record.seconds:.0f} s, {reused} of them reused. Report: {path}",
        highlight=False,
        soft_wrap=True,
    )


def show_plan(recipe: Recipe, store: Store | None, console: Console) -> None:
    """Print what a run would do; without a store, everything."""
    for number, step in enumerate(plan(recipe.stages, store), 1):
        state = f"cached    {step.artifact.id}" if step.artifact else "will run"
        console.print(
            f"{number:3}. {step.name:<28} {step.stage.kind:<14} {state}", highlight=False, soft_wrap=True
        )


def read_run(store: Store, name: str | None) -> RunRecord:
    """The record of a recipe's last run, or of the newest run of all.

    Raises:
        BadInput: nothing has run in this store, or nothing of that name.
        DamagedArtifact: the record is not one that a run wrote.
    """
    paths = sorted(store.root.glob(f"runs/*/{RECORD}"), key=lambda path: path.stat().st_mtime)
    if not paths:
        raise BadInput("nothing has run in this store", where=store.root, fix="gyro run RECIPE, or --store")
    by_name = {path.parent.name: path for path in paths}
    if name is not None and name not in by_name:
        raise BadInput(f"no run of {name!r} in this store{did_you_mean(name, by_name)}", where=store.root)
    path = paths[-1] if name is None else by_name[name]
    try:
        return RunRecord.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise DamagedArtifact(
            f"the record of the run cannot be read: {error.errors()[0]['msg']}",
            where=path,
            fix="run the recipe again: finished stages are reused, and the record is written anew",
        ) from error


def run_folder(store: Store, name: str) -> Path:
    """Where the record and the report of a recipe's last run stand."""
    return store.root / "runs" / name


def _stage_record(done: Done) -> StageRecord:
    return StageRecord(
        name=done.name,
        kind=done.stage.kind,
        artifact=done.artifact.id,
        inputs=done.stage.references(),
        reused=done.reused,
        seconds=done.seconds,
    )


def _line(done: Done, number: int, total: int) -> str:
    how = "reused" if done.reused else f"{done.seconds:.1f} s"
    headline = {name: n for name, n in done.artifact.manifest.counts.items() if "/" not in name and n}
    counts = ", ".join(f"{value:,} {name}" for name, value in headline.items())
    return f"[{number}/{total}] {done.name}: {how}  {done.artifact.id}  {counts}"
