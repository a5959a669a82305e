"""`gyro eval` and `gyro calibrate`: what a model scores, and how far its confidence can be trusted.

Both are recipes put together here, so that what is finished is found again, and lineage knows of it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from gyrocompass.cli.model import model_folder
from gyrocompass.core.errors import BadInput
from gyrocompass.core.store import Store
from gyrocompass.recipe.recipe import Recipe, recipe_from
from gyrocompass.recipe.run import run_recipe


def eval(options: argparse.Namespace) -> int:
    """Evaluate on tasks and held-out files."""
    recipe = judging_recipe("eval", model_folder(options), options.tasks, options.data, options.set)
    run_recipe(recipe, Store(options.store, options.store_url), Console())
    return 0


def calibrate(options: argparse.Namespace) -> int:
    """Evaluate, then calibrate on what came of it."""
    folder = model_folder(options)
    recipe = judging_recipe("calibrate", folder, options.tasks, options.data, options.set, calibrated=True)
    run_recipe(recipe, Store(options.store, options.store_url), Console())
    return 0


def judging_recipe(
    name: str,
    model: Path,
    tasks: list[Path],
    data: list[Path],
    overrides: list[str],
    *,
    calibrated: bool = False,
) -> Recipe:
    """A recipe that judges one model.

    Args:
        name: of the run.
        model: its folder.
        tasks: files of tasks.
        data: files that it was not trained on: texts to score, conversations to choose answers in.
        overrides: such as `stages.evaluation.most_items=50`.
        calibrated: whether a calibration follows.

    Raises:
        BadInput: there is nothing to judge by.
    """
    if not tasks and not data:
        raise BadInput("there is nothing to judge by", fix="give --tasks FILE or --data FILE")
    stages: dict[str, Any] = {"model": {"kind": "imported_model", "folder": str(model)}}
    evaluation: dict[str, Any] = {
        "kind": "evaluation",
        "model": "model",
        "tasks": [str(path) for path in tasks],
    }
    if data:
        stages |= {
            "tokenizer": {"kind": "tokenizer_of", "model": "model"},
            "documents": {"kind": "documents", "sources": [{"files": {"path": str(path)}} for path in data]},
            "tokens": {"kind": "tokens", "documents": "documents", "tokenizer": "tokenizer"},
        }
        evaluation |= {"held_out": "tokens", "answers": "documents"}
    stages["evaluation"] = evaluation
    if calibrated:
        stages["calibration"] = {"kind": "calibration", "evaluation": "evaluation"}
    return recipe_from({"name": name, "stages": stages}, overrides, f"gyro {name}")
